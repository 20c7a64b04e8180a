"""Mean and standard deviation per channel over any number of latents, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from lwd.latents import Normalization


class ChannelStatistics:
    """Streaming mean and variance in float64 (Chan et al. 1983); parts made apart can be merged in any grouping."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)

    def update(self, latents: Tensor) -> Self:
        """Add latents [N, C, H, W]."""
        if not len(latents):
            return self
        flat = latents.detach().double().cpu().transpose(0, 1).flatten(1)
        mean = flat.mean(dim=1)
        return self._add(flat.shape[1], mean, (flat - mean[:, None]).square().sum(dim=1))

    def merge(self, other: ChannelStatistics) -> Self:
        """Add everything that `other` has seen."""
        return self._add(other.count, other.mean, other.squares) if other.count else self

    def _add(self, count: int, mean: Tensor, squares: Tensor) -> Self:
        shift, total = mean - self.mean, self.count + count
        self.squares += squares + shift**2 * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total
        return self

    def normalization(self) -> Normalization:
        """Mean and unbiased standard deviation; ValueError for fewer than two values per channel."""
        if self.count < 2:
            raise ValueError(f"statistics need at least 2 values per channel, not {self.count}")
        std = (self.squares / (self.count - 1)).sqrt()
        # A channel that never varies (the black border of a picture) is left at its own scale.
        return Normalization(tuple(self.mean.tolist()), tuple(torch.where(std > 1e-6, std, 1.0).tolist()))

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        result = cls(len(data["mean"]))
        result.count = data["count"]
        result.mean = torch.tensor(data["mean"], dtype=torch.float64)
        result.squares = torch.tensor(data["squares"], dtype=torch.float64)
        return result
