"""Writing a latent set from tensors of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from lwd.data.layout import FEATURES, FLIP, MANIFEST, SCALE, Row, group_key, write_manifest, write_shard
from lwd.data.memory import check_labels, check_views
from lwd.data.quantize import quantize
from lwd.data.statistics import ChannelStatistics
from lwd.latents import LatentSpec, Normalization


class ShardWriter:
    """Writes a latent set shard by shard; the manifest comes last, so a set with a manifest is complete.

    As a context manager it closes the set on success, and leaves it unfinished, without a manifest, on an error.

    Args:
        directory: of the set. Shards that an interrupted writer left there are replaced.
        spec, class_names: what the latents are.
        encoders: per group, what made it.
        normalization: statistics to use; by default those of the (unmirrored) latents written.
        shard_size: images per shard.
        dtype: that latents are stored in.
        provenance: anything worth keeping about the origin, as JSON.

    Raises:
        FileExistsError: the directory holds a finished latent set.
    """

    def __init__(
        self,
        directory: str | Path,
        spec: LatentSpec,
        class_names: Sequence[str],
        *,
        encoders: Mapping[str, Any],
        normalization: Normalization | None = None,
        shard_size: int = 1000,
        dtype: torch.dtype = torch.float32,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"a shard holds at least 1 image, not {shard_size}")
        self.directory, self.spec, self.class_names = Path(directory), spec, tuple(class_names)
        # Writing over it would mix old and new shards under the old manifest if it were interrupted.
        if (self.directory / MANIFEST).exists():
            raise FileExistsError(
                f"{directory} holds a finished latent set; choose another directory, or delete it to encode again"
            )
        self.encoders, self.normalization, self.shard_size = dict(encoders), normalization, shard_size
        self.dtype, self.provenance = dtype, dict(provenance or {})
        self.shards: list[dict[str, Any]] = []
        self._pending: list[dict[str, Tensor]] = []
        self._room = shard_size
        self._added = 0
        self._layout: dict[str, Row] = {}
        self._statistics = ChannelStatistics(spec.channels)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def add(
        self,
        latents: Tensor,
        labels: Tensor,
        *,
        flipped: Tensor | None = None,
        features: Tensor | None = None,
        flipped_features: Tensor | None = None,
        eight_bit: bool = False,
    ) -> None:
        """Append latents [n, C, H, W], not normalised, and labels [n]; they are copied.

        Args:
            flipped: latents of the mirrored images, [n, C, H, W].
            features: REPA features [n, F, h, w], stored in their dtype.
            flipped_features: those of the mirrored images.
            eight_bit: store the features in 8 bits, see `quantize`.

        Raises:
            ValueError: wrong channels, NaN or infinity (the images are named), labels out of range, or other arrays,
                shapes or dtypes than before. Nothing of the batch is kept.
        """
        self.spec.check(latents)
        check_labels(labels, len(latents), len(self.class_names))
        check_views(latents, flipped, features, flipped_features)
        arrays = {"labels": labels.long()}
        for suffix, z, f in (("", latents, features), (FLIP, flipped, flipped_features)):
            if z is not None:
                self._require_finite(z, f"latents{suffix}")
                arrays |= latent_arrays(self.spec, z, suffix, self.dtype)
            if f is not None:
                self._require_finite(f, FEATURES + suffix)
                arrays |= feature_arrays(f, suffix, torch.int8 if eight_bit else f.dtype)
        layout = {key: Row(array.dtype, tuple(array.shape[1:])) for key, array in arrays.items()}
        if self._added and layout != self._layout:
            differing = sorted(key for key in layout.keys() | self._layout if layout.get(key) != self._layout.get(key))
            raise ValueError(
                f"images from {self._added} on have other arrays than the images before: "
                + ", ".join(f"{key} (now {layout.get(key)}, before {self._layout.get(key)})" for key in differing)
            )
        self._layout = layout
        self._statistics.update(latents)
        self._added += len(latents)
        # The caller may reuse its buffers before the shard is written.
        arrays = {key: array.detach().to("cpu", copy=True) for key, array in arrays.items()}
        start = 0
        while start < len(latents):
            end = min(start + self._room, len(latents))
            self._pending.append({key: array[start:end] for key, array in arrays.items()})
            self._room -= end - start
            if self._room == 0:
                self._write()
            start = end

    def close(self) -> Path:
        """Write what is left and the manifest; returns the directory."""
        if not self._added:
            raise ValueError(f"no latents were added to {self.directory}")
        if self._pending:
            self._write()
        # What an interrupted writer left behind the last shard would be read by readers that know no manifest.
        written = {entry["file"] for shard in self.shards for entry in shard["files"]}
        for leftover in [*self.directory.glob("shard-*.safetensors"), *self.directory.glob(".shard-*.tmp")]:
            if leftover.name not in written:
                leftover.unlink()
        write_manifest(
            self.directory,
            self.spec,
            self._layout,
            shards=self.shards,
            normalization=self.normalization or self._statistics.normalization(),
            class_names=self.class_names,
            encoders=self.encoders,
            provenance=self.provenance,
        )
        return self.directory

    def _require_finite(self, values: Tensor, what: str) -> None:
        bad = not_finite(values)
        if bad:
            raise ValueError(
                f"{what} of images {[i + self._added for i in bad][:8]} contain NaN or infinity; nothing of this batch "
                "was kept"
            )

    def _write(self) -> None:
        arrays = {key: torch.cat([part[key] for part in self._pending]) for key in self._layout}
        entry = write_shard(self.directory / f"shard-{len(self.shards):05}.safetensors", arrays)
        self.shards.append({"count": self.shard_size - self._room, "files": [entry]})
        self._pending, self._room = [], self.shard_size


def latent_arrays(spec: LatentSpec, latents: Tensor, suffix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a shard stores of `latents` [n, C, H, W]; `suffix` tells the mirrored view."""
    parts = zip(spec.names, spec.split(latents), strict=True)
    return {group_key(name) + suffix: part.to(dtype) for name, part in parts}


def feature_arrays(features: Tensor, suffix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a shard stores of REPA `features` [n, F, h, w]; int8 comes with scales."""
    key = FEATURES + suffix
    if dtype == torch.int8:
        quantized, scale = quantize(features)
        return {key: quantized, key + SCALE: scale}
    return {key: features.to(dtype)}


def not_finite(values: Tensor) -> list[int]:
    """The rows of `values` that hold NaN or infinity."""
    rows: list[int] = (~values.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    return rows
