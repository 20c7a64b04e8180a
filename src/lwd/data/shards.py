"""Composite latents on disk and in memory.

A latent set is a directory of ``*.safetensors`` shards and a ``manifest.json``. Keys follow SFD's: ``latents`` for the
texture group, ``latents_sv`` for the semantic one, ``latents_<name>`` for any other, ``feats_dino`` for REPA features,
``labels``; an array may have a ``_flip`` twin computed from the mirrored pixels. The manifest names groups, encoders,
classes and shards (with checksums) and holds the normalisation statistics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lwd.files import read_json, write_atomically, write_json
from lwd.latents import LatentSpec, Normalization

FORMAT = "lwd-latents/1"
KEYS = {"texture": "latents", "semantic": "latents_sv"}
FEATURES = "feats_dino"


def group_key(name: str) -> str:
    """The key of a group's array in a shard."""
    return KEYS.get(name, f"latents_{name}")


@dataclass(frozen=True)
class Batch:
    """Normalised latents [B, C, H, W], labels [B], and REPA features [B, F, h, w] where the set has them."""

    latents: Tensor
    labels: Tensor
    features: Tensor | None = None


class TensorLatents:
    """A latent set in memory: of one's own tensors, or `LatentDataset.to_memory`.

    Args:
        spec: the groups.
        latents: [N, C, H, W], not yet normalised; on any device.
        labels: [N] integers from 0.
        normalization: statistics; those of `latents` by default.
        flipped: latents of the mirrored images, if any.
        features: REPA features [N, F, h, w], if any.
    """

    def __init__(
        self,
        spec: LatentSpec,
        latents: Tensor,
        labels: Tensor,
        *,
        normalization: Normalization | None = None,
        flipped: Tensor | None = None,
        features: Tensor | None = None,
        class_names: Sequence[str] = (),
        encoders: Mapping[str, Any] | None = None,
    ) -> None:
        spec.check(latents)
        if labels.shape != (len(latents),):
            raise ValueError(f"{len(latents)} latents but labels of shape {tuple(labels.shape)}")
        if len(class_names) and not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
            raise ValueError(f"labels run from {labels.min()} to {labels.max()} for {len(class_names)} classes")
        self.spec, self.latents, self.labels = spec, latents, labels
        self.normalization = normalization if normalization is not None else Normalization.from_latents(latents)
        self.flipped, self.features = flipped, features
        self.class_names, self.encoders = tuple(class_names), dict(encoders or {})

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the latent grid."""
        return self.latents.shape[2], self.latents.shape[3]

    def gather(self, indices: Tensor, flip: Tensor | None = None) -> Batch:
        """The images `indices` [B]; those with `flip` mirrored."""
        indices = indices.to(self.latents.device)
        latents = self.latents[indices]
        if flip is not None:
            if self.flipped is None:
                raise ValueError("this latent set has no mirrored latents; train with flips=False, or encode with them")
            latents = torch.where(flip.to(indices.device)[:, None, None, None], self.flipped[indices], latents)
        features = None if self.features is None else self.features[indices]
        return Batch(self.normalization.normalize(latents), self.labels[indices], features)


class ShardWriter:
    """Writes a latent set shard by shard; the manifest comes last, so a set with a manifest is complete.

    Args:
        directory: of the set. Shards that an interrupted writer left are overwritten.
        spec, class_names: what the latents are.
        encoders: per group, what made it.
        normalization: statistics to use; by default those of the latents written.
        shard_size: images per shard.
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
    ) -> None:
        self.directory, self.spec, self.class_names = Path(directory), spec, tuple(class_names)
        self.encoders, self.normalization, self.shard_size = dict(encoders), normalization, shard_size
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.shards: list[dict[str, Any]] = []
        self.statistics = _ChannelStatistics(spec.channels)
        self.grid: tuple[int, int] | None = None

    def add(self, latents: Tensor, labels: Tensor) -> None:
        """Append latents [n, C, H, W], not normalised, and labels [n].

        Raises:
            ValueError: wrong channels, NaN or infinity (the images are named), labels out of range.
        """
        self.spec.check(latents)
        first = self._pending_count() + sum(s["count"] for s in self.shards)
        bad = (~latents.isfinite().flatten(1).all(dim=1)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"latents of images {(bad + first).tolist()[:8]} contain NaN or infinity; nothing was kept"
            )
        if labels.shape != (len(latents),) or not 0 <= int(labels.min()) <= int(labels.max()) < len(self.class_names):
            raise ValueError(
                f"labels must be one of 0 to {len(self.class_names) - 1} for each of {len(latents)} images; they have "
                f"shape {tuple(labels.shape)} and run from {labels.min()} to {labels.max()}"
            )
        self.grid = self.grid or (latents.shape[2], latents.shape[3])
        if latents.shape[2:] != self.grid:
            raise ValueError(f"grid {tuple(latents.shape[2:])} differs from {self.grid} of the images before")
        self.statistics.update(latents)
        self.pending.append((latents.float().cpu(), labels.long().cpu()))
        while self._pending_count() >= self.shard_size:
            self._write(self.shard_size)

    def close(self) -> Path:
        """Write what is left and the manifest; returns the directory."""
        if self.pending:
            self._write(self._pending_count())
        if not self.shards or self.grid is None:
            raise ValueError(f"no latents were added to {self.directory}")
        normalization = self.normalization or self.statistics.normalization()
        write_json(
            self.directory / "manifest.json",
            {
                "format": FORMAT,
                "groups": [
                    group | {"key": group_key(group["name"]), "dtype": "float32"} for group in self.spec.to_dict()
                ],
                "encoders": self.encoders,
                "grid": list(self.grid),
                "class_names": list(self.class_names),
                "count": sum(s["count"] for s in self.shards),
                "shards": self.shards,
                "normalization": normalization.to_dict(),
            },
        )
        return self.directory

    def _pending_count(self) -> int:
        return sum(len(labels) for _, labels in self.pending)

    def _write(self, count: int) -> None:
        latents, labels = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        self.pending = [(latents[count:], labels[count:])] if len(labels) > count else []
        arrays = {
            group_key(name): part.contiguous()
            for name, part in zip(self.spec.names, self.spec.split(latents[:count]), strict=True)
        }
        path = self.directory / f"shard-{len(self.shards):05}.safetensors"
        write_atomically(
            path, lambda temporary: save_file({**arrays, "labels": labels[:count].contiguous()}, temporary)
        )
        self.shards.append({"file": path.name, "count": count, "sha256": _sha256(path), "bytes": path.stat().st_size})


class LatentDataset:
    """A latent set on disk; `open` checks it, `to_memory` makes it ready for training."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory, self.manifest = directory, manifest
        self.spec = LatentSpec.from_dict(
            [{key: group[key] for key in ("name", "channels", "weight")} for group in manifest["groups"]]
        )
        self.normalization = Normalization.from_dict(manifest["normalization"])
        self.class_names: tuple[str, ...] = tuple(manifest["class_names"])
        self.grid: tuple[int, int] = tuple(manifest["grid"])
        self.encoders: dict[str, Any] = manifest["encoders"]

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """The latent set in `directory`.

        Raises:
            FileNotFoundError: no manifest, so no set or an unfinished one; or a shard is missing.
            ValueError: the manifest is damaged or of another format; a shard is truncated (named, with both sizes).
        """
        directory = Path(directory)
        if not (directory / "manifest.json").exists():
            raise FileNotFoundError(
                f"{directory} holds no finished latent set (no manifest.json); make one with `lwd encode`"
            )
        manifest = read_json(directory / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{directory}/manifest.json has format {manifest.get('format')!r}, expected {FORMAT!r}")
        for shard in manifest["shards"]:
            path = directory / shard["file"]
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing; delete {directory} and encode again")
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"{path} is truncated or changed: {path.stat().st_size} bytes, expected {shard['bytes']}; delete "
                    f"{directory} and encode again"
                )
        return cls(directory, manifest)

    def __len__(self) -> int:
        return int(self.manifest["count"])

    def check(self) -> None:
        """Compare every shard with its checksum; ValueError naming the first that differs."""
        for shard in self.manifest["shards"]:
            if _sha256(self.directory / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{self.directory / shard['file']} fails its checksum; encode again")

    def to_memory(self, device: torch.device | str = "cpu") -> TensorLatents:
        """All latents on `device`: the way to train on sets that fit."""
        shards = [self._read(self.directory / shard["file"]) for shard in self.manifest["shards"]]
        latents, labels = (torch.cat(parts) for parts in zip(*shards, strict=True))
        return TensorLatents(
            self.spec,
            latents.to(device),
            labels.to(device),
            normalization=self.normalization,
            class_names=self.class_names,
            encoders=self.encoders,
        )

    def _read(self, path: Path) -> tuple[Tensor, Tensor]:
        try:
            with safe_open(path, "pt") as shard:
                parts = [shard.get_tensor(group_key(name)) for name in self.spec.names]
                return torch.cat(parts, dim=1).float(), shard.get_tensor("labels")
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); delete {self.directory} and encode again") from error


class _ChannelStatistics:
    """Streaming mean and variance per channel in float64 (Chan et al. 1983)."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def update(self, latents: Tensor) -> None:
        flat = latents.double().cpu().transpose(0, 1).flatten(1)
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
