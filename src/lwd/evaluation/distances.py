"""Distances between sets of features: Frechet distance, precision and recall, inception score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lwd.evaluation.statistics import ROUNDING, Features, FeatureStatistics, as_features


class PrecisionRecall(NamedTuple):
    """Share of generated samples near the reference, and share of reference samples near the generated ones."""

    precision: float
    recall: float


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
    mean_a, factor_a = _mean_and_factor(a, "a")
    mean_b, factor_b = _mean_and_factor(b, "b")
    if len(mean_a) != len(mean_b):
        raise ValueError(
            f"a has {len(mean_a)} features per sample and b {len(mean_b)}; both must come from the same network"
        )
    mean_b, factor_b = mean_b.to(mean_a.device), factor_b.to(mean_a.device)
    # tr (S_a S_b)^{1/2}: with S_a = A A^T and S_b = B B^T, the eigenvalues of S_a S_b are the squared singular values
    # of A^T B. The symmetric A^T S_b A would be cheaper, but it squares them: an eigenvalue of 0 that comes out as
    # eps adds sqrt(eps) to the sum, for every direction without data.
    trace_of_root = torch.linalg.svdvals(factor_a.T @ factor_b).sum()
    traces = factor_a.square().sum() + factor_b.square().sum()
    return max(float((mean_a - mean_b).square().sum() + traces - 2 * trace_of_root), 0.0)


def _mean_and_factor(x: Features | FeatureStatistics, name: str) -> tuple[Tensor, Tensor]:
    """Mean [D], and A [D, rank or more] with A A^T = covariance."""
    if not isinstance(x, FeatureStatistics):
        features = as_features(x, f"features {name!r}")
        samples, width = features.shape
        if 2 <= samples <= width:  # the centred samples are such an A, and the smaller one
            mean = features.mean(dim=0)
            return mean, (features - mean).T / math.sqrt(samples - 1)
        x = FeatureStatistics.of(features, f"features {name!r}")
    return x.mean, _factor(x.cov, name)


def _factor(cov: Tensor, name: str) -> Tensor:
    """A [D, rank] with A A^T = cov: Cholesky, or without the directions that are nothing but rounding."""
    rounding = len(cov) * torch.finfo(cov.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(cov)
    pivots = factor.diagonal().square()
    if not failed and pivots.min() > rounding * pivots.max():
        return factor
    eigenvalues, vectors = torch.linalg.eigh(cov)
    largest = eigenvalues.abs().max()
    if eigenvalues[0] < -ROUNDING * largest:
        raise ValueError(
            f"the covariance of {name!r} has the eigenvalue {float(eigenvalues[0]):.3g} beside {float(largest):.3g}; "
            "a covariance has none below 0. Compute it from the features again"
        )
    kept = eigenvalues > rounding * largest
    return vectors[:, kept] * eigenvalues[kept].sqrt()


def precision_recall(
    reference: Features, generated: Features, k: int = 3, *, max_elements: int = 1 << 24
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq. 1-3).

    A set's manifold is the union of balls around its samples, each reaching the sample's k-th nearest neighbour in
    the same set (itself not counted). Precision is the share of `generated` in the manifold of `reference`;
    recall the share of `reference` in the manifold of `generated`.

    Args:
        reference: features [N, D], N > k.
        generated: features [M, D], M > k; moved to the device of `reference`.
        k: neighbour that sets the radius.
        max_elements: most distances held at once (8 bytes each); the result does not depend on it.

    Raises:
        ValueError: NaN or infinite features, different widths, k < 1, k >= N or k >= M.
    """
    reference, generated = as_features(reference, "reference features"), as_features(generated, "generated features")
    if reference.shape[1] != generated.shape[1]:
        raise ValueError(
            f"reference has {reference.shape[1]} features per sample and generated {generated.shape[1]}; both must "
            "come from the same network"
        )
    for name, features in (("reference", reference), ("generated", generated)):
        if not 1 <= k < len(features):
            raise ValueError(
                f"k must be at least 1 and less than the number of samples, got k = {k} with {len(features)} {name}"
            )
    centre = reference.mean(dim=0)  # distances do not change, their rounding does
    reference, generated = reference - centre, generated.to(reference.device) - centre
    radii_reference = _squared_radii(reference, k, max_elements)
    radii_generated = _squared_radii(generated, k, max_elements)
    covered = torch.zeros(len(generated), dtype=torch.bool, device=reference.device)
    recalled = 0
    for start, distances in _squared_distances(reference, generated, max_elements):
        covered |= (distances <= radii_reference[start : start + len(distances), None]).any(dim=0)
        recalled += int((distances <= radii_generated).any(dim=1).sum())
    return PrecisionRecall(int(covered.sum()) / len(generated), recalled / len(reference))


def _squared_distances(a: Tensor, b: Tensor, max_elements: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, squared distances [rows, M]) for consecutive blocks of rows of `a` [N, D] against `b` [M, D]."""
    squares_b = b.square().sum(dim=1)
    for start, rows in _blocks(a, max(1, max_elements // len(b))):
        scale = rows.square().sum(dim=1)[:, None] + squares_b
        distances = torch.addmm(scale, rows, b.T, alpha=-2)
        # Below this, only rounding of the expansion is left: equal samples are at distance 0 exactly.
        yield start, distances.masked_fill_(distances < 1e-12 * scale, 0)


def _squared_radii(x: Tensor, k: int, max_elements: int) -> Tensor:
    """Squared distance [N] from each sample to its k-th nearest other sample."""
    radii = []
    for start, distances in _squared_distances(x, x, max_elements):
        distances.diagonal(offset=start).fill_(float("inf"))
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _blocks(x: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(x), rows):
        yield start, x[start : start + rows]


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
    for _, part in _blocks(p, chunk):
        # xlogy: a class of probability 0 contributes 0
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(dim=0))
        scores.append(float(divergence.sum(dim=1).mean().exp()))
    return float(np.mean(scores))
