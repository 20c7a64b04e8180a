"""Scores of sets of features as wholes: Frechet distance, inception score. (Neighbours: `neighbours`.)"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lwd.evaluation.statistics import ROUNDING, Features, FeatureStatistics, as_features

_LARGE = 256
"""Width from which the eigenvalues' shortcut is worth trying; below, singular values take no time."""
_TOLERANCE = 1e-6
"""Error, relative to the distance, up to which the shortcut's result is taken."""


def frechet_distance(a: Features | FeatureStatistics, b: Features | FeatureStatistics) -> float:
    r"""Squared Frechet (2-Wasserstein) distance of two Gaussians fitted to features, in float64.

    .. math:: |\mu_a - \mu_b|^2 + \mathrm{tr}\, S_a + \mathrm{tr}\, S_b - 2\, \mathrm{tr} (S_a S_b)^{1/2}

    (Dowson and Landau 1982; Heusel et al. 2017, Eq. 6.) With Inception's pool3 features this is the FID.

    Args:
        a: features [N, D] (tensor or array), N >= 2, or their statistics. Symmetric in `a` and `b`.
        b: the same, with the same D; moved to the device of `a`.

    Raises:
        ValueError: NaN or infinite features, different widths, fewer than 2 samples, a covariance with a negative
            eigenvalue.
    """
    p, q = _gaussian(a, "a"), _gaussian(b, "b")
    if len(p.mean) != len(q.mean):
        raise ValueError(
            f"a has {len(p.mean)} features per sample and b {len(q.mean)}; both must come from the same network"
        )
    means = float((p.mean - q.mean.to(p.mean.device)).square().sum())
    traces = float(p.factor.square().sum()) + float(q.factor.square().sum())
    # tr (S_a S_b)^{1/2}: with S_a = A A^T and S_b = B B^T, the eigenvalues of S_a S_b are the squared singular values
    # of A^T B.
    product = p.factor.T @ q.factor.to(p.factor.device)
    if len(p.mean) >= _LARGE and p.log_det is not None and q.log_det is not None:
        trace, error = _sum_of_roots(product, p.log_det + q.log_det)
        distance = means + traces - 2 * trace
        if 2 * error <= _TOLERANCE * distance:
            return distance
    trace = float(torch.linalg.svdvals(product).sum())
    return max(means + traces - 2 * trace, 0.0)


def _sum_of_roots(product: Tensor, log_det: float) -> tuple[float, float]:
    r"""Sum of the singular values of X, [n, n], from the eigenvalues of X X^T, and an estimate of its error.

    Twice as fast as the singular values, but X X^T squares them: an eigenvalue that is wrong by e puts the sum off by
    e / (2 sqrt(lambda)), up to sqrt(e). Backward stability alone bounds that by 1e7 times the error seen on natural
    spectra. So the error is also measured. log det X X^T is known from the triangular factors to full precision, and
    the sum of the eigenvalues' logarithms shows the *relative* errors e / lambda, which are largest for the small
    ones. The estimate is the largest error of the sum that agrees with both: every |e| within backward stability,
    and relative errors whose root of the sum of squares is within 10 times the mismatch seen (they are
    taken as independent, in the logarithms as in the roots).

    Args:
        log_det: log det X X^T.

    Returns:
        (sum, estimated error); the error is infinite where an eigenvalue comes out as 0 or less.
    """
    eigenvalues = torch.linalg.eigvalsh(product @ product.T).flip(0)  # largest first
    if not eigenvalues[-1] > 0:
        return math.nan, math.inf
    logs, eps = eigenvalues.log(), torch.finfo(eigenvalues.dtype).eps
    mismatch = abs(float(logs.sum()) - log_det) + len(logs) * eps * float(logs.abs().max())
    # Rounding adds up like a random walk (Higham and Mary 2019): sqrt(n) eps |X|^2.
    largest = math.sqrt(len(logs)) * eps * float(eigenvalues.sum())
    relative = (largest / eigenvalues).square().cumsum(0).sqrt()
    # The large eigenvalues' bounds cost least of the mismatch for what they add to the error: as many as it pays for.
    bounded = eigenvalues[: 1 + int((relative <= 10 * mismatch).sum())]
    return float(eigenvalues.sqrt().sum()), largest / 2 * math.sqrt(float((1 / bounded).sum()))


class _Gaussian(NamedTuple):
    mean: Tensor  # [D]
    factor: Tensor  # A [D, rank or more] with A A^T = covariance
    log_det: float | None  # of the covariance, where it is certain to have full rank


def _gaussian(x: Features | FeatureStatistics, name: str) -> _Gaussian:
    if not isinstance(x, FeatureStatistics):
        features = as_features(x, f"features {name!r}")
        samples, width = features.shape
        if 2 <= samples <= width:  # the centred samples are such an A, and the smaller one
            mean = features.mean(dim=0)
            return _Gaussian(mean, (features - mean).T / math.sqrt(samples - 1), None)
        x = FeatureStatistics.of(features, f"features {name!r}")
    cov = x.cov
    rounding = len(cov) * torch.finfo(cov.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(cov)
    pivots = factor.diagonal().square()
    if not failed and pivots.min() > rounding * pivots.max():
        return _Gaussian(x.mean, factor, float(pivots.log().sum()))
    # Without the directions that are nothing but rounding.
    eigenvalues, vectors = torch.linalg.eigh(cov)
    largest = eigenvalues.abs().max()
    if eigenvalues[0] < -ROUNDING * largest:
        raise ValueError(
            f"the covariance of {name!r} has the eigenvalue {float(eigenvalues[0]):.3g} beside {float(largest):.3g}; "
            "a covariance has none below 0. Compute it from the features again"
        )
    kept = eigenvalues > rounding * largest
    return _Gaussian(x.mean, vectors[:, kept] * eigenvalues[kept].sqrt(), None)


def inception_score(probabilities: Features, chunk: int = 5000) -> float:
    r"""Inception score, :math:`\exp E_x KL(p(y|x) \,\|\, p(y))` (Salimans et al. 2016), averaged over chunks.

    Chunks are taken in order and a shorter last one counts like the others, as in ADM's evaluator, so samples that
    are sorted by class must be shuffled first.

    Args:
        probabilities: class probabilities [N, classes]; rows sum to 1.
        chunk: samples per chunk.

    Raises:
        ValueError: NaN, negative values, rows that do not sum to 1 (logits?), no samples, chunk < 1.
    """
    p = as_features(probabilities, "probabilities")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if not len(p):
        raise ValueError("the inception score needs at least 1 sample, got 0")
    worst = float((p.sum(dim=1) - 1).abs().max())
    if p.min() < 0 or worst > 1e-2:
        raise ValueError(
            f"rows of probabilities must be non-negative and sum to 1; the least value is {float(p.min()):.3g} and a "
            f"row sum is off by {worst:.3g}. Apply a softmax to logits first"
        )
    scores = []
    for part in p.split(chunk):
        # xlogy: a class of probability 0 contributes 0
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(dim=0))
        scores.append(float(divergence.sum(dim=1).mean().exp()))
    return float(np.mean(scores))
