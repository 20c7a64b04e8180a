"""Composite latents on disk.

A latent set is a directory of ``*.safetensors`` shards and a ``manifest.json``. Keys follow SFD's: ``latents`` for the
texture group, ``latents_sv`` for the semantic one, ``latents_<name>`` for any other, ``feats_dino`` for REPA features,
``labels``; latents and features may have a ``_flip`` twin computed from the mirrored pixels. The manifest names groups,
encoders, classes and shards (with checksums) and holds the normalisation statistics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lwd.data.memory import NO_FLIPS, Batch, TensorLatents, check_labels, check_views
from lwd.files import read_json, write_atomically, write_json
from lwd.latents import LatentSpec, Normalization

FORMAT = "lwd-latents/1"
KEYS = {"texture": "latents", "semantic": "latents_sv"}
FEATURES = "feats_dino"
FLIP = "_flip"


def group_key(name: str) -> str:
    """The key of a group's array in a shard."""
    return KEYS.get(name, f"latents_{name}")


class ShardWriter:
    """Writes a latent set shard by shard; the manifest comes last, so a set with a manifest is complete.

    As a context manager it closes the set on success, and leaves it unfinished, without a manifest, on an error.

    Args:
        directory: of the set. Shards that an interrupted writer left there are replaced.
        spec, class_names: what the latents are.
        encoders: per group, what made it.
        normalization: statistics to use; by default those of the (unmirrored) latents written.
        shard_size: images per shard.
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
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if shard_size < 1:
            raise ValueError(f"a shard holds at least 1 image, not {shard_size}")
        self.directory, self.spec, self.class_names = Path(directory), spec, tuple(class_names)
        # Writing over it would mix old and new shards under the old manifest if it were interrupted.
        if (self.directory / "manifest.json").exists():
            raise FileExistsError(
                f"{directory} holds a finished latent set; choose another directory, or delete it to encode again"
            )
        self.encoders, self.normalization, self.shard_size = dict(encoders), normalization, shard_size
        self.provenance = dict(provenance or {})
        self.shards: list[dict[str, Any]] = []
        self._pending: list[dict[str, Tensor]] = []
        self._room = shard_size
        self._added = 0
        self._layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._statistics = _ChannelStatistics(spec.channels)

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
    ) -> None:
        """Append latents [n, C, H, W], not normalised, and labels [n]; they are copied.

        Args:
            flipped: latents of the mirrored images, [n, C, H, W].
            features: REPA features [n, F, h, w], stored in their dtype.
            flipped_features: those of the mirrored images.

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
                for name, part in zip(self.spec.names, self.spec.split(z), strict=True):
                    arrays[group_key(name) + suffix] = part.float()
            if f is not None:
                self._require_finite(f, FEATURES + suffix)
                arrays[FEATURES + suffix] = f
        layout = {key: (array.dtype, tuple(array.shape[1:])) for key, array in arrays.items()}
        if self._added and layout != self._layout:
            differing = sorted(key for key in layout.keys() | self._layout if layout.get(key) != self._layout.get(key))
            raise ValueError(
                f"images from {self._added} on have other arrays than the images before: {', '.join(differing)} "
                f"(now {[layout.get(key) for key in differing]}, before {[self._layout.get(key) for key in differing]})"
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
        written = {shard["file"] for shard in self.shards}
        for leftover in [*self.directory.glob("shard-*.safetensors"), *self.directory.glob(".shard-*.tmp")]:
            if leftover.name not in written:
                leftover.unlink()
        normalization = self.normalization or self._statistics.normalization()
        groups = [g | {"key": group_key(g["name"]), "dtype": "float32"} for g in self.spec.to_dict()]
        features = None
        if FEATURES in self._layout:
            dtype, shape = self._layout[FEATURES]
            features = {"key": FEATURES, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        write_json(
            self.directory / "manifest.json",
            {
                "format": FORMAT,
                "groups": groups,
                "features": features,
                "flips": any(key.endswith(FLIP) for key in self._layout),
                "encoders": self.encoders,
                "grid": list(self._layout[groups[0]["key"]][1][1:]),
                "class_names": list(self.class_names),
                "count": self._added,
                "shards": self.shards,
                "normalization": normalization.to_dict(),
                "provenance": self.provenance,
            },
        )
        return self.directory

    def _require_finite(self, values: Tensor, what: str) -> None:
        bad = (~values.isfinite().flatten(1).all(dim=1)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{what} of images {(bad + self._added).tolist()[:8]} contain NaN or infinity; nothing of this batch "
                "was kept"
            )

    def _write(self) -> None:
        arrays = {key: torch.cat([part[key] for part in self._pending]).contiguous() for key in self._layout}
        path = self.directory / f"shard-{len(self.shards):05}.safetensors"
        write_atomically(path, lambda temporary: save_file(arrays, temporary))
        count = self.shard_size - self._room
        self.shards.append({"file": path.name, "count": count, "sha256": _sha256(path), "bytes": path.stat().st_size})
        self._pending, self._room = [], self.shard_size


class LatentDataset:
    """A latent set on disk, memory-mapped: each shard is opened once, at its first use.

    `gather` reads from the mapping; `to_memory` is faster for sets that fit.

    Attributes:
        flips: whether there are latents of the mirrored images.
        features: whether there are REPA features.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest
        self.spec = LatentSpec.from_dict(
            [{key: group[key] for key in ("name", "channels", "weight")} for group in manifest["groups"]]
        )
        self.normalization = Normalization.from_dict(manifest["normalization"])
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.grid: tuple[int, int] = tuple(manifest["grid"])
        self.encoders: dict[str, Any] = manifest["encoders"]
        self.flips = bool(manifest.get("flips", False))
        self.features = manifest.get("features") is not None
        self._ends = torch.tensor([shard["count"] for shard in manifest["shards"]]).cumsum(0)
        self._open: dict[int, dict[str, Tensor]] = {}
        # What every shard must hold: key -> shape of one image's array.
        self._shapes: dict[str, tuple[int, ...]] = {"labels": ()}
        for suffix in ("", FLIP) if self.flips else ("",):
            for name, channels in zip(self.spec.names, self.spec.sizes, strict=True):
                self._shapes[group_key(name) + suffix] = (channels, *self.grid)
            if self.features:
                self._shapes[FEATURES + suffix] = tuple(manifest["features"]["shape"])

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """The latent set in `directory`.

        Raises:
            FileNotFoundError: no manifest, so no set or an unfinished one; or a shard is missing.
            ValueError: the manifest is damaged or of another format; a shard is truncated (named, with both sizes).
        """
        directory = Path(directory)
        manifest_path = directory / "manifest.json"
        if not manifest_path.exists():
            raise FileNotFoundError(
                f"{directory} holds no finished latent set (no manifest.json); make one with `lwd encode`"
            )
        manifest = read_json(manifest_path)
        found = manifest.get("format") if isinstance(manifest, dict) else None
        if found != FORMAT:
            raise ValueError(f"{manifest_path} has format {found!r}, expected {FORMAT!r}")
        try:
            for shard in manifest["shards"]:
                path = directory / shard["file"]
                if not path.exists():
                    raise FileNotFoundError(f"{path} is missing; delete {directory} and encode again")
                if path.stat().st_size != shard["bytes"]:
                    raise ValueError(
                        f"{path} is truncated or changed: {path.stat().st_size} bytes, expected {shard['bytes']}; "
                        f"delete {directory} and encode again"
                    )
            data = cls(directory, manifest)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{manifest_path} is incomplete ({error!r}); delete {directory} and encode again"
            ) from error
        if not manifest["shards"] or int(data._ends[-1]) != manifest.get("count"):
            raise ValueError(f"the shards in {manifest_path} do not add up to its count of {manifest.get('count')}")
        return data

    def __len__(self) -> int:
        return int(self._ends[-1])

    def check(self) -> None:
        """Compare every shard with its checksum; ValueError naming the first that differs."""
        for shard in self.manifest["shards"]:
            if _sha256(self.directory / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{self.directory / shard['file']} fails its checksum; encode again")

    def gather(self, indices: Tensor, flip: Tensor | None = None) -> Batch:
        """The images `indices` [B], on the CPU; those with `flip` [B] mirrored, latents and features alike.

        Raises:
            IndexError: an index outside the set.
            ValueError: `flip` for a set without mirrored latents; a shard that differs from the manifest.
        """
        indices = indices.cpu()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"indices run from {indices.min()} to {indices.max()} in a latent set of {len(self)}")
        if flip is not None and not self.flips:
            raise ValueError(NO_FLIPS)
        shard = torch.searchsorted(self._ends, indices, right=True)
        local = indices - torch.cat([self._ends.new_zeros(1), self._ends])[shard]
        # Rows of one shard and one view are read together; Python runs once for each of those, not for each image.
        source = 2 * shard + (0 if flip is None else flip.cpu().long())
        ordered, order = source.sort()
        sources, counts = ordered.unique_consecutive(return_counts=True)
        latents = torch.empty(len(indices), self.spec.channels, *self.grid)
        labels = torch.empty(len(indices), dtype=torch.int64)
        features = None
        for number, rows in zip(sources.tolist(), order.split(counts.tolist()), strict=True):
            arrays, suffix = self._shard(number // 2), FLIP if number % 2 else ""
            here, first = local[rows], 0
            labels[rows] = arrays["labels"][here]
            for name, channels in zip(self.spec.names, self.spec.sizes, strict=True):
                latents[rows, first : first + channels] = arrays[group_key(name) + suffix][here].float()
                first += channels
            if self.features:
                part = arrays[FEATURES + suffix][here]
                features = part.new_empty(len(indices), *part.shape[1:]) if features is None else features
                features[rows] = part
        return Batch(self.normalization.normalize(latents), labels, features)

    def to_memory(self, device: torch.device | str = "cpu") -> TensorLatents:
        """The whole set on `device`: the way to train on sets that fit."""

        def latents(suffix: str) -> Tensor:
            return torch.cat([all_of(group_key(name) + suffix).float() for name in self.spec.names], dim=1)

        def all_of(key: str) -> Tensor:
            parts = [self._shard(number)[key] for number in range(len(self._ends))]
            return torch.cat(parts).to(device)

        return TensorLatents(
            self.spec,
            latents(""),
            all_of("labels"),
            normalization=self.normalization,
            flipped=latents(FLIP) if self.flips else None,
            features=all_of(FEATURES) if self.features else None,
            flipped_features=all_of(FEATURES + FLIP) if self.features and self.flips else None,
            class_names=self.class_names,
            encoders=self.encoders,
        )

    def _shard(self, number: int) -> dict[str, Tensor]:
        """The memory-mapped arrays of one shard."""
        if number not in self._open:
            shard = self.manifest["shards"][number]
            path = self.directory / shard["file"]
            try:
                # The tensors are views of the mapped file, which outlives the context.
                with safe_open(path, "pt") as file:
                    arrays = {key: file.get_tensor(key) for key in self._shapes}
            except SafetensorError as error:
                raise ValueError(
                    f"{path} cannot be read ({error}); delete {self.directory} and encode again"
                ) from error
            for key, shape in self._shapes.items():
                if arrays[key].shape != (shard["count"], *shape):
                    raise ValueError(
                        f"{path} holds {key} of shape {tuple(arrays[key].shape)}, but its manifest says "
                        f"{(shard['count'], *shape)}; delete {self.directory} and encode again"
                    )
            self._open[number] = arrays
        return self._open[number]


class _ChannelStatistics:
    """Streaming mean and variance per channel in float64 (Chan et al. 1983)."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        flat = latents.detach().double().cpu().transpose(0, 1).flatten(1)
        count, mean = flat.shape[1], flat.mean(dim=1)
        shift, total = mean - self.mean, self.count + count
        self.squares += (flat - mean[:, None]).square().sum(dim=1) + shift**2 * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def normalization(self) -> Normalization:
        std = (self.squares / (self.count - 1)).sqrt()
        # A channel that never varies (the black border of a picture) is left at its own scale.
        return Normalization(tuple(self.mean.tolist()), tuple(torch.where(std > 1e-6, std, 1.0).tolist()))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
