"""Where along global time the steps of a fixed-step solver lie.

The kinetic energy of the path (the integrand of LWD Eq. 37, along sampled trajectories)

    E(tau) = mean over images of sum_g t_g'(tau)^2 ||v_g||^2 / d_g

is high where the state moves fast. Steps of equal arc length, the integral of sqrt(E), are short there. Within a
smooth piece of the schedule they may further be drawn towards its ends, where a multistep solver has little to look
back to (cosine spacing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lwd.latents import LatentSpec, resolve_spec
from lwd.objective import Denoiser
from lwd.sampling import sample, share_steps
from lwd.schedules import Schedule

Spacing = Literal["uniform", "cosine"]


@dataclass(frozen=True)
class KineticDensity:
    """E(tau) of a model on its schedule, constant in each of K cells.

    Attributes:
        tau: edges of the cells, K + 1 from 0 to 1, the schedule's kinks among them.
        density: E in each cell, K.
    """

    tau: tuple[float, ...]
    density: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.tau) != len(self.density) + 1 or not all(a < b for a, b in pairwise(self.tau)):
            raise ValueError(
                f"{len(self.density)} densities need {len(self.density) + 1} increasing edges, not {self.tau}"
            )
        if not all(0 <= value < float("inf") for value in self.density):
            raise ValueError(f"an energy density is finite and not negative, unlike {self.density}")

    def arc_length(self) -> tuple[float, ...]:
        """The integral of sqrt(E) from 0 to each edge, [K + 1]."""
        return (0.0, *np.cumsum(np.sqrt(self.density) * np.diff(self.tau)).tolist())


def kinetic_density(
    denoiser: Denoiser,
    schedule: Schedule,
    noise: Tensor,
    labels: Tensor,
    *,
    points: int = 32,
    spec: LatentSpec | None = None,
) -> KineticDensity:
    """E(tau) from one pilot run of the midpoint method, with two evaluations a cell.

    Args:
        denoiser: the one to be sampled from, guidance included; see `lwd.sample`.
        noise, labels: of the pilot's images, [B, C, H, W] and [B]; a few dozen are enough.
        points: cells K, at least one for every smooth piece.
        spec: latent groups; by default the denoiser's.

    Raises:
        ValueError: as `lwd.sample`.
    """
    spec = resolve_spec(spec, denoiser, noise.shape[1], schedule.groups)
    pilot = _Pilot(denoiser, spec)
    edges = place_steps(schedule, points)
    sample(pilot, schedule, noise, labels, solver="midpoint", steps=edges, spec=spec)
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(edges)], dtype=torch.float64)
    dt = schedule.frozen().cpu().local_times(middles).dt
    # Every second evaluation is at the middle of a cell, the others at its start.
    squares = torch.stack(pilot.squares[1::2]).cpu().double()
    return KineticDensity(tuple(edges), tuple((dt**2 * squares).sum(dim=1).tolist()))


class _Pilot:
    """A denoiser that notes ||v_g||^2 / d_g of every evaluation, mean over its images, [G]."""

    def __init__(self, denoiser: Denoiser, spec: LatentSpec) -> None:
        self.denoiser, self.spec = denoiser, spec
        self.needs_tau = getattr(denoiser, "needs_tau", False)
        self.squares: list[Tensor] = []

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor, **options: Tensor) -> Tensor:
        v = self.denoiser(z, t, labels, **options)
        self.squares.append(self.spec.group_mean(v.to(z.dtype) ** 2).mean(dim=0))
        return v


def place_steps(
    schedule: Schedule, steps: int, density: KineticDensity | None = None, *, spacing: Spacing = "uniform"
) -> list[float]:
    """Times of `steps` steps, for `lwd.sample(..., steps=...)`: every kink of the schedule is one.

    Args:
        density: makes arc length the measure of a step; without it, global time is.
        spacing: within a smooth piece, ``"uniform"`` or ``"cosine"``: n steps with ends at (1 - cos(pi i / n)) / 2 of
            the piece's length, which makes the first and the last of them short.

    Raises:
        ValueError: fewer steps than smooth pieces; the density of a schedule with other kinks.
    """
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing is {spacing!r}; choose one of {', '.join(map(repr, get_args(Spacing)))}")
    stops = (0.0, *schedule.kinks, 1.0)
    edges: Sequence[float] = stops
    length: Sequence[float] = stops
    if density is not None and density.arc_length()[-1] > 0:
        edges, length = density.tau, density.arc_length()
        if not set(stops) <= set(edges):
            raise ValueError(
                f"this density was not measured on this schedule: of its kinks {schedule.kinks}, some lie inside cells"
            )
    ends = np.interp(stops, edges, length).tolist()
    shares = share_steps(list(pairwise(ends)), steps)
    times = [0.0]
    for end, (first, last), n in zip(stops[1:], pairwise(ends), shares, strict=True):
        part = np.arange(1, n) / n
        if spacing == "cosine":
            part = (1 - np.cos(np.pi * part)) / 2
        times += [*np.interp(first + (last - first) * part, length, edges).tolist(), end]
    return times
