"""Sampling: the ODE of the asynchronous flow, integrated over global time (LWD Eq. 28-29).

    dz_g / dtau = t_g'(tau) v_g(z, t(tau), c),   tau from 0 to 1

Kinks of the schedule are never stepped over: each smooth piece is integrated by itself. Every image has its own
adaptive steps and its own noise, so the image of a seed does not depend on what else is in the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from lwd.interpolant import global_velocity
from lwd.latents import LatentSpec, resolve_spec
from lwd.objective import Denoiser
from lwd.schedules import Schedule
from lwd.solvers import SOLVERS, Dopri5
from lwd.solvers.flow import Array


@dataclass(frozen=True)
class SampleResult:
    """What `sample` returns.

    Attributes:
        latents: [B, C, H, W] at tau = 1 (still normalised).
        evaluations: model evaluations of the costliest image; a guided evaluation counts once.
        evaluations_per_image: [B]; they differ only for an adaptive solver.
        times: recorded global times, and
        states: the states at those times, each [B, C, H, W]; both empty unless `record` was given.
    """

    latents: Tensor
    evaluations: int
    evaluations_per_image: Tensor
    times: tuple[float, ...] = ()
    states: tuple[Tensor, ...] = field(default=(), repr=False)


def seeded_noise(seeds: Sequence[int] | Tensor, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Gaussian noise [len(seeds), *shape], image i from `seeds[i]` alone.

    Drawn on the CPU, so that a seed means the same noise on every device and in every batch.
    """
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=torch.Generator().manual_seed(int(seed)))
    return noise.to(device)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    noise: Tensor,
    labels: Tensor,
    *,
    solver: str = "dopri5",
    steps: int | Sequence[float] | None = None,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    spec: LatentSpec | None = None,
    record: Sequence[float] = (),
    on_evaluation: Callable[[float], None] | None = None,
) -> SampleResult:
    """Carry noise at tau = 0 to latents at tau = 1.

    Args:
        denoiser: (z, t, labels) -> local velocities; may be a guidance. One with an attribute `needs_tau` that is
            true is called as (z, t, labels, tau=tau), with the global times [B] in the dtype of z.
        schedule: gives t(tau) and t'(tau).
        noise: [B, C, H, W]; see `seeded_noise`.
        labels: [B].
        solver: ``"dopri5"`` (adaptive); of fixed steps, with one evaluation each ``"ab2"``, ``"ab3"``, ``"dpmpp2m"``,
            ``"dpmpp3m"`` or ``"euler"``, with two ``"heun"`` or ``"midpoint"``. See `lwd.solvers`.
        steps: of a fixed-step solver: how many, default 50, shared out over the smooth pieces by their length (at
            least one each); or the global times themselves, increasing from 0 to 1 with every kink of the schedule
            among them (see `lwd.placement`). An adaptive solver takes none.
        atol, rtol: tolerances of the adaptive solver, held by every image on its own (root mean square over its
            components); the paper's are the defaults.
        spec: latent groups; by default the denoiser's.
        record: global times in [0, 1] whose states are kept; the solver stops at each, beside the times
            that `steps` may give.
        on_evaluation: called after every batched evaluation with the least global time reached, for progress bars.

    Raises:
        ValueError: unknown solver, contradictory settings, times that miss a kink, shapes that do not match.
        FloatingPointError: the velocity became NaN or infinite; says at which global time.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    method = SOLVERS[solver]
    if steps is not None and isinstance(method, Dopri5):
        raise ValueError(f"{solver} chooses its own steps: set atol and rtol, or a fixed-step solver, instead of steps")
    if labels.shape != (len(noise),):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, expected [{len(noise)}] as noise has that many rows"
        )
    if not all(0 <= time <= 1 for time in record):
        raise ValueError(f"recorded times lie in [0, 1]; got {list(record)}")
    spec = resolve_spec(spec, denoiser, noise.shape[1], schedule.groups)
    spec.check(noise, "noise")

    flow = _GlobalFlow(denoiser, schedule, spec, labels, on_evaluation)
    z, evaluations = noise, torch.zeros(len(noise), dtype=torch.long)
    kept = {0.0: noise}

    def keep(tau: float, z: Tensor) -> None:
        if tau in record:
            kept[tau] = z

    if isinstance(method, Dopri5):
        step = None
        for start, end in pairwise(sorted({0.0, 1.0, *schedule.kinks, *record})):
            if start in schedule.kinks:
                step = None  # a step size found before a kink says nothing about what follows it
            z, per_image, step = method.integrate(flow.on(start, end), z, start, end, atol, rtol, step)
            evaluations += per_image
            keep(end, z)
    else:
        for times in _times_of_pieces(schedule.kinks, record, 50 if steps is None else steps):
            z, used = method.integrate(flow.on(times[0], times[-1]), z, times, keep)
            evaluations += used
    return SampleResult(
        latents=z,
        evaluations=int(evaluations.max()),
        evaluations_per_image=evaluations,
        times=tuple(record),
        states=tuple(kept[float(time)] for time in record),
    )


class _GlobalFlow:
    """The flow over global time: V of Eq. 13, and the local velocities and clocks that it is made of."""

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        spec: LatentSpec,
        labels: Tensor,
        on_evaluation: Callable[[float], None] | None,
    ) -> None:
        self.denoiser, self.schedule, self.spec = denoiser, schedule, spec
        self.labels, self.on_evaluation = labels, on_evaluation
        self.needs_tau = bool(getattr(denoiser, "needs_tau", False))
        self.inside = (0.0, 1.0)

    def on(self, start: float, end: float) -> _GlobalFlow:
        """The same on one smooth piece. At a kink the derivative belongs to the piece being integrated."""
        piece = copy.copy(self)
        # Just inside: 1e-6 of the piece is far below any tolerance and, on the straight pieces of an offset, changes
        # nothing.
        margin = 1e-6 * (end - start) if self.schedule.kinks else 0.0
        piece.inside = (start + margin, end - margin)
        return piece

    def __call__(self, tau: Tensor, z: Tensor, rows: Tensor | None) -> Tensor:
        dt = self.schedule.local_times(tau.clamp(*self.inside)).dt.to(z.dtype)
        return global_velocity(self.local_velocity(tau, z, rows), dt, self.spec)

    def local_velocity(self, tau: Tensor, z: Tensor, rows: Tensor | None = None) -> Tensor:
        t = self.schedule.local_times(tau).t.to(z.dtype)
        labels = self.labels if rows is None else self.labels[rows]
        if self.needs_tau:
            v = cast(Any, self.denoiser)(z, t, labels, tau=tau.to(z.dtype))
        else:
            v = self.denoiser(z, t, labels)
        if v.shape != z.shape:
            raise ValueError(f"the denoiser returned {tuple(v.shape)} for a state of {tuple(z.shape)}")
        if self.on_evaluation is not None:
            self.on_evaluation(float(tau.min()))
        return v.to(z.dtype)

    def clocks(self, tau: Array) -> tuple[Array, Array]:
        on_host = self.schedule.frozen().cpu()
        times = on_host.local_times(torch.from_numpy(tau))
        dt = on_host.local_times(torch.from_numpy(tau.clip(*self.inside))).dt
        return times.t.numpy(), dt.numpy()


def _times_of_pieces(
    kinks: Sequence[float], record: Sequence[float], steps: int | Sequence[float]
) -> list[list[float]]:
    """The times of the steps of every smooth piece, both ends included.

    Args:
        record: times to stop at, besides.
        steps: how many steps in all, or their times.
    """
    stops = sorted({0.0, 1.0, *kinks, *record})
    if isinstance(steps, Iterable):
        given = [float(time) for time in steps]
        if len(given) < 2 or (given[0], given[-1]) != (0.0, 1.0) or not all(a < b for a, b in pairwise(given)):
            raise ValueError(f"times of steps must increase strictly from 0 to 1; got {given}")
        missing = [kink for kink in kinks if kink not in given]
        if missing:
            raise ValueError(
                f"the times of the steps lack {missing}, where a group starts, stops or changes its pace at once; a "
                "step over such a kink loses the solver's order (lwd.placement.place_steps keeps them)"
            )
        times = sorted({*given, *stops})
    else:
        pieces = list(pairwise(stops))
        times = [0.0]
        for (start, end), n in zip(pieces, share_steps(pieces, steps), strict=True):
            times += torch.linspace(start, end, n + 1, dtype=torch.float64).tolist()[1:]
    return [[time for time in times if start <= time <= end] for start, end in pairwise([0.0, *kinks, 1.0])]


def share_steps(pieces: Sequence[tuple[float, float]], steps: int) -> list[int]:
    """Whole steps for every piece, by length and at least one, `steps` in all."""
    if steps < len(pieces):
        raise ValueError(
            f"{steps} steps for a path of {len(pieces)} pieces (kinks and recorded times): at least one each"
        )
    shares = [1] * len(pieces)
    for _ in range(steps - len(pieces)):
        longest = max(range(len(pieces)), key=lambda i: (pieces[i][1] - pieces[i][0]) / shares[i])
        shares[longest] += 1
    return shares
