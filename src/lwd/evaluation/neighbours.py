"""Improved precision and recall (Kynkaanniemi et al. 2019) of large sets: each distance is computed once, in tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lwd.evaluation.numerics import float32_arithmetic
from lwd.evaluation.statistics import Features, as_features
from lwd.linear import inner_products

Distances = Literal["float64", "float32", "float16"]

# Below this share of |a|^2 + |b|^2 a squared distance is only rounding of its expansion: equal samples are at
# distance 0 exactly.
_ROUNDING = {torch.float64: 1e-12, torch.float32: 4e-6}
# float16 reaches 65504; every intermediate result of a distance is at most 4 times the largest squared norm.
_HALF_LIMIT = 16_000.0


class PrecisionRecall(NamedTuple):
    """Share of generated samples near the reference, and share of reference samples near the generated ones."""

    precision: float
    recall: float


def precision_recall(
    reference: Features,
    generated: Features,
    k: int = 3,
    *,
    distances: Distances = "float64",
    max_elements: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, Eq. 1-3).

    A set's manifold is the union of balls around its samples, each reaching the sample's k-th nearest neighbour in
    the same set (itself not counted). Precision is the share of `generated` in the manifold of `reference`;
    recall the share of `reference` in the manifold of `generated`.

    Args:
        reference: features [N, D], N > k.
        generated: features [M, D], M > k; moved to the device of `reference`.
        k: neighbour that sets the radius.
        distances: arithmetic. "float32" is about twice as fast as "float64"; it moves samples within 1e-6 of a
            ball's surface. "float16" is ADM's: features, squares, norms, products and sums each rounded to half
            precision (sums inside a norm or product in float32); use `half_distances_fit` first.
        max_elements: most distances held at once (up to 20 bytes each); the result does not depend on it. By default
            4 million, which a processor's cache holds, or 64 million on a GPU.
        progress: called as progress(tiles done, tiles) after each tile of distances.

    Raises:
        ValueError: NaN or infinite features, different widths, k < 1, k >= N or k >= M, features that are too large
            for float16.
    """
    if distances not in get_args(Distances):
        raise ValueError(f"distances must be one of {', '.join(get_args(Distances))}, got {distances!r}")
    dtype, largest = (torch.float64, 1e140) if distances == "float64" else (torch.float32, 1e15)
    reference = as_features(reference, "reference features", largest, dtype)
    generated = as_features(generated, "generated features", largest, dtype)
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
    generated = generated.to(reference.device)
    half = distances == "float16"
    if half and not half_distances_fit(reference, generated):
        raise ValueError(f"half-precision distances overflow with squared norms above {_HALF_LIMIT:.0f}; use float32")
    if not half:  # distances do not change, their rounding does; ADM's half precision is of the features as they are
        centre = reference.mean(dim=0)
        reference, generated = reference - centre, generated - centre
    if max_elements is None:
        max_elements = 1 << (22 if reference.device.type == "cpu" else 26)
    side = max(1, math.isqrt(max_elements))
    tiles = [math.ceil(len(x) / side) for x in (reference, generated)]
    total = sum(n * (n + 1) // 2 for n in tiles) + tiles[0] * tiles[1]
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with float32_arithmetic(reference.device):
        a, b = _Points.of(reference, half), _Points.of(generated, half)
        radii_a, radii_b = _squared_radii(a, k, side, step), _squared_radii(b, k, side, step)
        recalled, covered = torch.zeros_like(radii_a, dtype=torch.bool), torch.zeros_like(radii_b, dtype=torch.bool)
        for rows in _blocks(len(radii_a), side):
            for columns in _blocks(len(radii_b), side):
                tile = a.squared_distances(rows, b, columns)
                covered[columns] |= (tile <= radii_a[rows, None]).any(dim=0)
                recalled[rows] |= (tile <= radii_b[columns]).any(dim=1)
                step()
    return PrecisionRecall(float(covered.double().mean()), float(recalled.double().mean()))


def memorised_share(training: Features, generated: Features, batch: int = 1024) -> float:
    """Share of `generated` that lie closer to their nearest training sample than any other training sample does.

    One minus the authenticity of Alaa et al. (2022): 1 for copies; for new samples of the same distribution about one
    half, which held-out samples show.

    Args:
        training: features [N, D], N > 1.
        generated: features [M, D].

    Raises:
        ValueError: NaN or infinite features, too few training samples.
    """
    training = as_features(training, "training features", 1e15, torch.float32)
    generated = as_features(generated, "generated features", 1e15, torch.float32).to(training.device)
    if len(training) < 2:
        raise ValueError("memorisation is seen against at least 2 training samples")
    a = _Points.of(training, half=False)
    apart = _squared_radii(a, 1, batch, lambda: None)
    b, copied = _Points.of(generated, half=False), 0
    for rows in _blocks(len(generated), batch):
        distance, nearest = b.squared_distances(rows, a, slice(0, len(training))).min(dim=1)
        copied += int((distance < apart[nearest]).sum())
    return copied / len(generated)


def half_distances_fit(*features: Tensor) -> bool:
    """Whether no intermediate result of ADM's half-precision distances can overflow for these features [N, D].

    Where one does, ADM falls back to float32 for that block of 10,000 x 10,000.
    """
    return all(float(x.square().sum(dim=1).max()) <= _HALF_LIMIT for part in features for x in part.split(4096))


class _Points(NamedTuple):
    """Samples [N, D] with their squared norms [N]."""

    x: Tensor
    squares: Tensor
    half: bool

    @classmethod
    def of(cls, x: Tensor, half: bool) -> _Points:
        if not half:
            return cls(x, torch.linalg.vector_norm(x, dim=1).square(), half)
        x = _to_half(x)
        squares = torch.cat([_to_half(_to_half(part.square()).sum(dim=1)) for part in x.split(4096)])
        return cls(x, squares, half)

    def squared_distances(self, rows: slice, other: _Points, columns: slice) -> Tensor:
        """Tile [rows, columns] of squared distances."""
        a, b = self.x[rows], other.x[columns]
        squares_a, squares_b = self.squares[rows, None], other.squares[columns]
        if self.half:
            return _to_half(_to_half(squares_a - 2 * _to_half(inner_products(a, b))) + squares_b).clamp_(min=0)
        scale = squares_a + squares_b
        tile = inner_products(a, b).mul_(-2).add_(scale)
        return tile.masked_fill_(tile < _ROUNDING[tile.dtype] * scale, 0)


def _to_half(x: Tensor) -> Tensor:
    return x.half().float()


def _squared_radii(points: _Points, k: int, side: int, step: Callable[[], None]) -> Tensor:
    """Squared distance [N] from each sample to its k-th nearest other sample.

    A sample is its own nearest (at distance 0, but for half precision), so this is the (k + 1)-th nearest of all.
    Distances are symmetric: a tile off the diagonal serves its rows and its columns.
    """
    nearest = points.x.new_full((len(points.x), k + 1), math.inf)

    def merge(part: slice, tile: Tensor) -> None:
        candidates = tile.topk(min(k + 1, tile.shape[1]), dim=1, largest=False, sorted=False).values
        both = torch.cat([nearest[part], candidates], dim=1)
        nearest[part] = both.topk(k + 1, dim=1, largest=False).values

    for i, rows in enumerate(_blocks(len(nearest), side)):
        for j, columns in enumerate(_blocks(len(nearest), side)):
            if j < i:
                continue
            tile = points.squared_distances(rows, points, columns)
            merge(rows, tile)
            if j > i:
                merge(columns, tile.T)
            step()
    return nearest[:, k].clone()


def _blocks(count: int, side: int) -> Iterator[slice]:
    for start in range(0, count, side):
        yield slice(start, min(start + side, count))
