"""The cheapest schedule through an error surface, for any lambda and any number of groups, without a probe.

The last group is the global clock, as in the learned family (Eq. 17). `best_path` searches all monotone curves: first a
lattice of them, exactly, by dynamic programming, so that no local minimum can hide the best one; then the coefficients
of a smooth curve from there, by gradient descent. `best_polynomial` stays within the family of Eq. 40-42.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lwd.schedules import BernsteinSchedule, PolynomialSchedule, Schedule
from lwd.surface import ErrorSurface, Weights

DEGREE = 12
"""Of the smooth curves: enough for one bend or two, too few to follow the noise of a surface."""
KNOTS = 8
"""Pieces of a lattice path."""
LATTICE = {2: 96, 3: 24}
"""Positions of a group on the lattice, by number of groups; slopes are multiples of `KNOTS` over it."""
_QUADRATURE = 12
_BLOCK = 1 << 20


def best_path(
    surface: ErrorSurface,
    *,
    kinetic: float = 0.0,
    weights: Weights = "information",
    degree: int = DEGREE,
    lattice: int | None = None,
    steps: int = 400,
) -> BernsteinSchedule:
    """The monotone schedule of the least cost (`ErrorSurface.cost`).

    Args:
        kinetic: lambda.
        weights: of the errors, see `ErrorSurface.density`.
        degree: of the polynomials that the curve consists of.
        lattice: positions of every other group in the search; by default 96 for two groups, 24 for three, 12 for more.
        steps: of the descent that follows the search.

    Raises:
        ValueError: a surface of one group; a negative lambda.
    """
    _check(surface, kinetic)
    path = _search(surface, kinetic, weights, KNOTS, lattice or LATTICE.get(len(surface.spec), 12))
    found = BernsteinSchedule(_descend(surface, kinetic, weights, path, degree, steps), names=surface.spec.names)
    _remember(found, surface, kinetic, weights)
    return found


def best_polynomial(
    surface: ErrorSurface,
    *,
    kinetic: float = 0.0,
    weights: Weights = "information",
    degree: int = 4,
    steps: int = 1500,
    lr: float = 0.05,
) -> PolynomialSchedule:
    """The schedule of the least cost among those that a probe can learn, by gradient descent on rho from its start.

    Arguments and errors as `best_path`; `degree` is M of Eq. 40.
    """
    _check(surface, kinetic)
    schedule = PolynomialSchedule(degree, groups=len(surface.spec), names=surface.spec.names).double()
    optimizer = torch.optim.Adam([schedule.rho], lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        surface.cost(schedule, kinetic=kinetic, weights=weights).backward()
        optimizer.step()
        decay.step()
    found = schedule.float().frozen()
    _remember(found, surface, kinetic, weights)
    return found


def _check(surface: ErrorSurface, kinetic: float) -> None:
    if len(surface.spec) < 2:
        raise ValueError("a path relates at least two groups; for one there is nothing to choose")
    if not kinetic >= 0:
        raise ValueError(f"lambda is at least 0, not {kinetic}")


def _remember(schedule: Schedule, surface: ErrorSurface, kinetic: float, weights: Weights) -> None:
    """Write down where `schedule` comes from, and its cost."""
    cost = float(surface.cost(schedule.frozen().double(), kinetic=kinetic, weights=weights))
    about = {"kinetic": kinetic, "weights": weights, "cost": cost, "surface": dict(surface.about)}
    schedule.provenance = {"path": about}


def _search(surface: ErrorSurface, kinetic: float, weights: Weights, knots: int, lattice: int) -> Tensor:
    """The best lattice path, [knots + 1, G]: from knot to knot the clock goes on by 1 / knots, every other group by any
    number of positions."""
    others = len(surface.spec) - 1
    axis = torch.linspace(0, 1, lattice + 1, dtype=torch.float64)
    states = torch.cartesian_prod(*[axis] * others).reshape(-1, others)
    ahead = (states[None] >= states[:, None]).all(dim=2).nonzero()  # pairs from, to that go nowhere back
    best = torch.full((len(states),), torch.inf, dtype=torch.float64)
    best[0], came_from = 0.0, []
    for knot in range(knots):
        total = torch.full((len(states), len(states)), torch.inf, dtype=torch.float64)
        alive = ahead[best[ahead[:, 0]].isfinite()]
        for pairs in alive.split(_BLOCK // _QUADRATURE):
            step = _segments(surface, states[pairs[:, 0]], states[pairs[:, 1]], knot, knots, kinetic, weights)
            total[pairs[:, 0], pairs[:, 1]] = best[pairs[:, 0]] + step
        best, origin = total.min(dim=0)
        came_from.append(origin)
    place, path = len(states) - 1, []
    for origin in reversed(came_from):
        path.append(states[place])
        place = int(origin[place])
    path.append(states[place])
    clock = torch.linspace(0, 1, knots + 1, dtype=torch.float64)
    return torch.cat([torch.stack(path[::-1]), clock[:, None]], dim=1)


def _segments(
    surface: ErrorSurface, begin: Tensor, end: Tensor, knot: int, knots: int, kinetic: float, weights: Weights
) -> Tensor:
    """The cost of straight lines between two knots, [N], for positions [N, G - 1] at them; by Gauss and Legendre."""
    points, heights = np.polynomial.legendre.leggauss(_QUADRATURE)
    nodes, shares = torch.from_numpy((points + 1) / 2), torch.from_numpy(heights / 2)
    others = torch.lerp(begin[:, None], end[:, None], nodes[:, None])  # [N, Q, G - 1]
    clock = ((knot + nodes) / knots).expand(len(begin), -1)[..., None]
    speed = torch.cat([(end - begin) * knots, torch.ones(len(begin), 1, dtype=torch.float64)], dim=1)
    t, dt = torch.cat([others, clock], dim=2), speed[:, None].expand(-1, len(nodes), -1)
    density = surface.density(t.flatten(0, 1), dt.flatten(0, 1), kinetic=kinetic, weights=weights)
    return density.view(len(begin), -1) @ shares / knots


def _descend(surface: ErrorSurface, kinetic: float, weights: Weights, path: Tensor, degree: int, steps: int) -> Tensor:
    """Coefficients [degree + 1, G] of a smooth curve, from a lattice path [K + 1, G]."""
    place = torch.linspace(0, len(path) - 1, degree + 1, dtype=torch.float64)
    low = place.floor().long().clamp(max=len(path) - 2)
    start = torch.lerp(path[low], path[low + 1], (place - low)[:, None])
    rises = start.diff(dim=0)[:, :-1].clamp(min=1e-4)
    logits = (rises / rises.sum(dim=0)).log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    best: tuple[float, Tensor] = (torch.inf, start)
    for _ in range(steps):
        optimizer.zero_grad()
        sums = logits.softmax(dim=0).cumsum(dim=0)
        risen = torch.cat([torch.zeros_like(sums[:1]), sums / sums[-1]])
        # Of the clock, whose coefficients are those of the identity.
        coefficients = torch.cat([risen, torch.linspace(0, 1, degree + 1, dtype=torch.float64)[:, None]], dim=1)
        cost = surface.cost(
            BernsteinSchedule(coefficients, names=surface.spec.names), kinetic=kinetic, weights=weights
        )  # fmt: skip
        if cost.item() < best[0]:
            best = cost.item(), coefficients.detach()
        cost.backward()
        optimizer.step()
        decay.step()
    return best[1]
