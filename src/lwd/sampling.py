"""Sampling: the ODE of the asynchronous flow, integrated over global time (LWD Eq. 28-29).

    dz_g / dtau = t_g'(tau) v_g(z, t(tau), c),   tau from 0 to 1

Kinks of the schedule are never stepped over: each smooth piece is integrated by itself. Every image has its own
adaptive steps and its own noise, so the image of a seed does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from lwd.interpolant import global_velocity
from lwd.latents import LatentSpec, resolve_spec
from lwd.objective import Denoiser
from lwd.schedules import Schedule
from lwd.solvers import SOLVERS, Dopri5, RungeKutta


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
    steps: int | None = None,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    spec: LatentSpec | None = None,
    record: Sequence[float] = (),
    on_evaluation: Callable[[float], None] | None = None,
) -> SampleResult:
    """Carry noise at tau = 0 to latents at tau = 1.

    Args:
        denoiser: (z, t, labels) -> local velocities; may be a guidance.
        schedule: gives t(tau) and t'(tau).
        noise: [B, C, H, W]; see `seeded_noise`.
        labels: [B].
        solver: ``"dopri5"`` (adaptive), ``"heun"``, ``"midpoint"`` or ``"euler"``.
        steps: steps of a fixed-step solver, default 50, shared out over the smooth pieces by their length (at least
            one each). An adaptive solver takes none.
        atol, rtol: tolerances of the adaptive solver, held by every image on its own (root mean square over its
            components); the paper's are the defaults.
        spec: latent groups; by default the denoiser's.
        record: global times in [0, 1] whose states are kept; the solver stops at each.
        on_evaluation: called after every batched evaluation with the least global time reached, for progress bars.

    Raises:
        ValueError: unknown solver, contradictory settings, shapes that do not match.
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

    stops = sorted({0.0, 1.0, *schedule.kinks, *record})
    pieces = list(pairwise(stops))
    flow = _GlobalFlow(denoiser, schedule, spec, on_evaluation)
    z, evaluations = noise, torch.zeros(len(noise), dtype=torch.long)
    kept = {0.0: noise}
    if isinstance(method, RungeKutta):
        for (start, end), n in zip(pieces, _share_steps(pieces, 50 if steps is None else steps), strict=True):
            z, used = method.integrate(flow.on(start, end, labels), z, start, end, n)
            evaluations += used
            kept[end] = z
    else:
        step = None
        for start, end in pieces:
            if start in schedule.kinks:
                step = None  # a step size found before a kink says nothing about what follows it
            z, per_image, step = method.integrate(flow.on(start, end, labels), z, start, end, atol, rtol, step)
            evaluations += per_image
            kept[end] = z
    return SampleResult(
        latents=z,
        evaluations=int(evaluations.max()),
        evaluations_per_image=evaluations,
        times=tuple(record),
        states=tuple(kept[float(time)] for time in record),
    )


class _GlobalFlow:
    """The global-time velocity V of Eq. 13 on one smooth piece of the schedule."""

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        spec: LatentSpec,
        on_evaluation: Callable[[float], None] | None,
    ) -> None:
        self.denoiser, self.schedule, self.spec, self.on_evaluation = denoiser, schedule, spec, on_evaluation

    def on(self, start: float, end: float, labels: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        # At a kink the derivative belongs to the piece being integrated: take it just inside. 1e-6 of the piece is
        # far below any tolerance and, on the straight pieces of an offset, changes nothing.
        margin = 1e-6 * (end - start) if self.schedule.kinks else 0.0

        def velocity(tau: Tensor, z: Tensor, rows: Tensor | None) -> Tensor:
            t = self.schedule.local_times(tau).t.to(z.dtype)
            dt = self.schedule.local_times(tau.clamp(start + margin, end - margin)).dt.to(z.dtype)
            here = labels if rows is None else labels[rows]
            # Only a guidance whose scale varies along global time asks for it.
            if getattr(self.denoiser, "needs_tau", False):
                v = self.denoiser(z, t, here, tau=tau.to(z.dtype))  # type: ignore[call-arg]
            else:
                v = self.denoiser(z, t, here)
            if v.shape != z.shape:
                raise ValueError(f"the denoiser returned {tuple(v.shape)} for a state of {tuple(z.shape)}")
            if self.on_evaluation is not None:
                self.on_evaluation(float(tau.min()))
            return global_velocity(v.to(z.dtype), dt, self.spec)

        return velocity


def _share_steps(pieces: Sequence[tuple[float, float]], steps: int) -> list[int]:
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
