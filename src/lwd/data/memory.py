"""Composite latents in memory, and the batch that every latent set hands to training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lwd.data.quantize import dequantize
from lwd.latents import LatentSpec, Normalization


@dataclass(frozen=True)
class Batch:
    """Normalised latents [B, C, H, W], labels [B], and stored REPA features [B, F, h, w] where there are any."""

    latents: Tensor
    labels: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class StoredBatch:
    """A batch as it lies on disk: latents [B, C, H, W] not normalised, features [B, F, h, w] perhaps in 8 bits with
    their `scales` [B, h, w]. A quarter to a half of the bytes of the `Batch` it becomes on the device."""

    latents: Tensor
    labels: Tensor
    features: Tensor | None = None
    scales: Tensor | None = None

    def to(self, device: torch.device | str, normalization: Normalization, features_out: Tensor | None = None) -> Batch:
        """The batch on `device`, normalised, in float32 (half precision features stay). Uses up this one's memory.

        Args:
            features_out: where 8-bit features are expanded to; new memory by default.
        """
        latents = self.latents.to(device, non_blocking=True).float()
        features = None if self.features is None else self.features.to(device, non_blocking=True)
        if features is not None and self.scales is not None:
            features = dequantize(features, self.scales.to(device, non_blocking=True), features_out)
        return Batch(normalization.normalize_(latents), self.labels.to(device, non_blocking=True), features)


class TensorLatents:
    """A latent set in memory: of one's own tensors, or `LatentDataset.to_memory`.

    Args:
        spec: the groups.
        latents: [N, C, H, W], not yet normalised; on any device.
        labels: [N] integers from 0.
        normalization: statistics; those of `latents` by default.
        flipped: latents of the mirrored images, if any.
        features: REPA features [N, F, h, w], if any.
        flipped_features: REPA features of the mirrored images; needed where there are `features` and `flipped`.
        fingerprint: of the set on disk that they came from; a run remembers it.

    Raises:
        ValueError: shapes or labels that do not fit one another, or no images.
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
        flipped_features: Tensor | None = None,
        class_names: Sequence[str] = (),
        encoders: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        spec.check(latents)
        check_labels(labels, len(latents), len(class_names))
        check_views(latents, flipped, features, flipped_features)
        self.spec, self.latents, self.labels = spec, latents, labels
        self.normalization = normalization if normalization is not None else Normalization.from_latents(latents)
        self.flipped, self.features, self.flipped_features = flipped, features, flipped_features
        self.class_names, self.encoders, self.fingerprint = tuple(class_names), dict(encoders or {}), fingerprint

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the latent grid."""
        return self.latents.shape[2], self.latents.shape[3]

    def gather(self, indices: Tensor, flip: Tensor | None = None) -> Batch:
        """The images `indices` [B]; those with `flip` [B] mirrored, latents and features alike."""
        indices = indices.to(self.latents.device)
        latents = self.latents[indices]
        features = None if self.features is None else self.features[indices]
        if flip is not None:
            if self.flipped is None:
                raise ValueError(NO_FLIPS)
            mirrored = flip.to(indices.device)[:, None, None, None]
            latents = torch.where(mirrored, self.flipped[indices], latents)
            if features is not None and self.flipped_features is not None:
                features = torch.where(mirrored, self.flipped_features[indices], features)
        return Batch(self.normalization.normalize(latents), self.labels[indices], features)


NO_FLIPS = "this latent set has no mirrored latents; train with flips=False, or encode with them"


def check_labels(labels: Tensor, count: int, classes: int) -> None:
    """ValueError unless `labels` are `count` integers from 0, below `classes` where that is known (not 0)."""
    if count == 0:
        raise ValueError("there are no images")
    if labels.shape != (count,):
        raise ValueError(f"{count} latents but labels of shape {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes and high >= classes):
        allowed = f"0 to {classes - 1}" if classes else "0 or more"
        raise ValueError(f"labels must be {allowed}; they run from {low} to {high}")


def check_views(latents: Tensor, flipped: Tensor | None, features: Tensor | None, mirrored: Tensor | None) -> None:
    """ValueError unless mirrored twins fit the originals; features need a twin exactly where latents have one."""
    if flipped is not None and flipped.shape != latents.shape:
        raise ValueError(f"mirrored latents have shape {tuple(flipped.shape)}, the latents {tuple(latents.shape)}")
    if features is not None and (features.ndim != 4 or len(features) != len(latents)):
        raise ValueError(f"features must be [{len(latents)}, F, h, w], not {tuple(features.shape)}")
    if (mirrored is not None) != (features is not None and flipped is not None):
        raise ValueError("features of the mirrored images go with both mirrored latents and features, or with neither")
    if features is not None and mirrored is not None and mirrored.shape != features.shape:
        raise ValueError(f"mirrored features have shape {tuple(mirrored.shape)}, the features {tuple(features.shape)}")
