"""Mean and covariance of features, gathered in batches, joined, and kept on disk."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lwd.files import write_atomically

Features = Tensor | np.ndarray

ROUNDING = 1e-4
"""What storage in float32 can do to a covariance, relative to its largest entry or eigenvalue, with room to spare."""


def as_features(features: Features, name: str, largest: float = 1e140, dtype: torch.dtype = torch.float64) -> Tensor:
    """`features` as a finite tensor [N, D] of `dtype` on its own device; ValueError that calls them `name` otherwise.

    Magnitudes above `largest` are refused too: sums of their squares would overflow, and the scores be NaN.
    """
    if isinstance(features, np.ndarray) and not features.flags.writeable:
        features = features.copy()  # torch warns of arrays that it must not write to, such as memory maps
    result = torch.as_tensor(features)
    if result.ndim != 2 or result.shape[1] == 0:
        raise ValueError(f"{name} must have shape [samples, features], got {list(result.shape)}")
    if result.is_complex():
        raise ValueError(f"{name} must be real, got {result.dtype}")
    result = result.detach().to(dtype)
    if not result.numel():
        return result
    reach = float(torch.stack(torch.aminmax(result)).abs().max())  # NaN if there is any; makes no copies
    if math.isfinite(reach) and reach <= largest:
        return result
    bad = int((~torch.isfinite(result)).sum())
    if bad:
        rows = int((~torch.isfinite(result)).any(dim=1).sum())
        raise ValueError(
            f"{name} hold {bad} values that are NaN or infinite, in {rows} of {len(result)} samples; look at the "
            "images (or the network in half precision) that they come from"
        )
    raise ValueError(f"{name} reach {reach:.3g}; above {largest:.0e} their squares overflow")


class FeatureStatistics:
    """Mean [D] and unbiased covariance [D, D] (divided by n - 1) of `count` feature vectors, in float64.

    Batches are joined by the pairwise update of Chan, Golub and LeVeque (1983), which never subtracts two large
    sums of squares: the result does not depend on the batches beyond rounding.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, a covariance that is not symmetric, a
            negative count.
    """

    def __init__(self, mean: Features, cov: Features, count: int) -> None:
        self.mean = as_features(torch.as_tensor(mean)[None], "the mean")[0].clone()
        cov = as_features(cov, "the covariance", largest=1e290)
        if cov.shape != (len(self.mean), len(self.mean)):
            raise ValueError(f"a mean of {len(self.mean)} features needs a square covariance, got {list(cov.shape)}")
        asymmetry = float((cov - cov.T).abs().max())
        if asymmetry > ROUNDING * float(cov.abs().max()):
            raise ValueError(f"a covariance must be symmetric; entries that should be equal differ by {asymmetry:.3g}")
        if count < 0:
            raise ValueError(f"the count of samples must not be negative, got {count}")
        self.count = int(count)
        self._scatter = cov * max(self.count - 1, 0)  # sum of (x - mean)(x - mean)^T

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> FeatureStatistics:
        """Statistics of no samples yet, to be filled by `update`."""
        zeros = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(zeros.new_zeros(width), zeros, 0)

    @classmethod
    def of(cls, features: Features, name: str = "the features") -> FeatureStatistics:
        """Statistics of `features` [N, D]; at least two samples."""
        features = as_features(features, name)
        if len(features) < 2:
            raise ValueError(f"{name}: a covariance needs at least 2 samples, got {len(features)}")
        statistics = cls.empty(features.shape[1], features.device)
        statistics.update(features)
        return statistics

    @property
    def width(self) -> int:
        return len(self.mean)

    @property
    def cov(self) -> Tensor:
        """Covariance [D, D]; ValueError before the second sample."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, these statistics have {self.count}")
        return self._scatter / (self.count - 1)

    def update(self, features: Features) -> None:
        """Take in a batch [N, D]; N = 0 changes nothing."""
        features = as_features(features, "the batch of features").to(self.mean.device)
        if features.shape[1] != self.width:
            raise ValueError(f"the batch has {features.shape[1]} features, the statistics {self.width}")
        if len(features):
            mean = features.mean(dim=0)
            centred = features - mean
            self._join(mean, centred.T @ centred, len(features))

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Statistics of both sets together, as a new object (for example from several processes)."""
        if other.width != self.width:
            raise ValueError(f"cannot merge statistics of {self.width} and {other.width} features")
        merged = FeatureStatistics.empty(self.width, self.mean.device)
        for part in (self, other):
            merged._join(part.mean.to(merged.mean.device), part._scatter.to(merged.mean.device), part.count)
        return merged

    def _join(self, mean: Tensor, scatter: Tensor, count: int) -> None:
        if count == 0:
            return
        total = self.count + count
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self._scatter = self._scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.count = total

    def save(self, path: str | Path) -> Path:
        """Write mean, cov and count as safetensors; ValueError before the second sample."""
        tensors = {
            "mean": self.mean.cpu().contiguous(),
            "cov": self.cov.cpu().contiguous(),
            "count": torch.tensor([self.count]),
        }
        return write_atomically(path, lambda temporary: save_file(tensors, temporary))

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged or holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no feature statistics at {path}")
        try:
            tensors = load_file(path)
            return cls(tensors["mean"], tensors["cov"], int(tensors["count"]))
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} does not hold feature statistics or is damaged ({error}); make it again"
            ) from error
