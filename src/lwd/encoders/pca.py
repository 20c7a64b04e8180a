"""Principal components of feature maps as semantic latents, fitted in one pass over any number of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lwd.files import write_atomically


class PCAFit:
    """Accumulates mean and covariance of tokens in float64 (Chan et al. 1983), then gives the components."""

    def __init__(self, features: int) -> None:
        self.count = 0
        self.mean = torch.zeros(features, dtype=torch.float64)
        self.scatter = torch.zeros(features, features, dtype=torch.float64)

    def update(self, maps: Tensor) -> Self:
        """Add feature maps [N, F, h, w]."""
        tokens = maps.movedim(1, -1).flatten(0, -2).to(self.mean)
        if tokens.shape[1] != len(self.mean):
            raise ValueError(f"feature maps of {tokens.shape[1]} features for a PCA of {len(self.mean)}")
        if not tokens.isfinite().all():
            raise ValueError("feature maps contain NaN or infinity; PCA cannot be fitted to them")
        mean = tokens.mean(dim=0)
        centred = tokens - mean
        shift, total = mean - self.mean, self.count + len(tokens)
        self.scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(tokens) / total)
        self.mean += shift * (len(tokens) / total)
        self.count = total
        return self

    def components(self, channels: int) -> PCA:
        """The `channels` directions of largest variance; ValueError for too many of them, or for constant features.

        A component's sign is arbitrary; its largest loading is made positive, so that equal data give equal latents.
        """
        if not 1 <= channels <= len(self.mean):
            raise ValueError(f"{channels} components from {len(self.mean)} features: choose 1 to {len(self.mean)}")
        if self.count <= channels:
            raise ValueError(f"{self.count} tokens are too few for {channels} components")
        if not self.scatter.diagonal().any():
            raise ValueError("the feature maps never vary; they have no principal components")
        variances, vectors = torch.linalg.eigh(self.scatter / (self.count - 1))
        variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1).T
        signs = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
        return PCA(
            (vectors * signs)[:channels].float(), self.mean.float(), (variances / variances.sum())[:channels].float()
        )


@dataclass(frozen=True)
class PCA:
    """A fitted projection.

    Attributes:
        directions: [channels, F], orthonormal rows.
        mean: [F].
        explained: share of the variance that each component holds, [channels].
    """

    directions: Tensor
    mean: Tensor
    explained: Tensor

    @property
    def channels(self) -> int:
        return len(self.directions)

    def transform(self, maps: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """[N, F, h, w] -> [N, channels, h, w]; nothing here is random."""
        if maps.shape[1] != len(self.mean):
            raise ValueError(f"feature maps of {maps.shape[1]} features for a PCA of {len(self.mean)}")
        directions, mean = self.directions.to(maps.device), self.mean.to(maps.device)
        return torch.einsum("cf,nfhw->nchw", directions, maps.float() - mean[:, None, None])

    def describe(self) -> dict[str, Any]:
        """The projection's entry in a manifest."""
        content = torch.cat([self.directions.flatten(), self.mean]).cpu().numpy().tobytes()
        return {
            "encoder": "pca",
            "channels": self.channels,
            "explained": float(self.explained.sum()),
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    def save(self, path: str | Path, *, fitted_to: Mapping[str, Any] | None = None) -> Path:
        """Write it as safetensors, with a note of what it was fitted to; OSError when that cannot be written."""
        tensors = {"directions": self.directions.contiguous(), "mean": self.mean, "explained": self.explained}
        metadata = {"fitted_to": json.dumps(fitted_to or {})}
        return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    @staticmethod
    def fitted_to(path: str | Path) -> dict[str, Any]:
        """The note that `save` left; empty without one."""
        with safe_open(path, framework="pt") as file:
            note: dict[str, Any] = json.loads((file.metadata() or {}).get("fitted_to", "{}"))
        return note

    @classmethod
    def load(cls, path: str | Path) -> PCA:
        try:
            return cls(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path} is damaged or not a PCA ({error}); fit it again") from error
