"""Dormand-Prince 5(4) with one step size per image."""

from __future__ import annotations

import torch
from torch import Tensor

from lwd.solvers.flow import Velocity, advance, combine, times_like

MAX_ATTEMPTS = 10_000
"""Steps an adaptive solver may try on one piece before it gives up."""


class Dopri5:
    """Dormand-Prince 5(4) (1980) with local extrapolation; every image takes its own steps.

    Error per image: root mean square of e / (atol + rtol max(|z|, |z_new|)) over its components, kept below 1. An
    evaluation carries over from one step to the next (first same as last), so accepted and rejected steps cost six
    evaluations each, and the start of a piece one (the first start two, to find a step size).
    """

    c = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
    a = (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    )
    # fifth minus fourth order weights
    e = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
    # Growing by 5 at most: an error below 2e-4 of the tolerance is rounding in float32, and its fifth root would carry
    # what else is in the batch into the steps.
    safety, shrink, grow = 0.9, 0.2, 5.0

    def integrate(
        self, velocity: Velocity, z: Tensor, start: float, end: float, atol: float, rtol: float, step: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z at `end`, evaluations per image [B], and the last step sizes [B], to start the next piece with."""
        if not (atol >= 0 and rtol >= 0 and atol + rtol > 0):
            raise ValueError(f"tolerances must not be negative and not both 0: atol={atol}, rtol={rtol}")
        batch = len(z)
        tau = times_like(start, z)
        k1 = velocity(tau, z, None)
        evaluations = torch.ones(batch, dtype=torch.long)
        if step is None:
            step = _initial_step(velocity, z, tau, k1, end, atol, rtol)
            evaluations += 1
        z, rows = z.clone(), torch.arange(batch, device=z.device)
        for _ in range(MAX_ATTEMPTS):
            # Only images on the way are evaluated.
            h = torch.minimum(step[rows], end - tau[rows])
            k = [k1[rows]]
            for c, a in zip(self.c[1:], self.a[1:], strict=True):
                new = advance(z[rows], h, a, k)
                k.append(velocity((tau[rows] + c * h).clamp(max=end), new, rows))
            evaluations[rows.cpu()] += 6
            scale = atol + rtol * torch.maximum(z[rows].abs(), new.abs())
            error = _norm(combine(h, self.e, k) / scale)
            failed = ~error.isfinite()
            if failed.any():
                first, last = float(tau[rows][failed].min()), float((tau[rows] + h)[failed].max())
                raise FloatingPointError(
                    f"the velocity is NaN or infinite between tau = {first:.4f} and tau = {last:.4f}"
                )
            accepted = error <= 1
            done = rows[accepted]
            arrived = accepted & (h >= end - tau[rows])
            tau[done] = torch.where(arrived, end, tau[rows] + h)[accepted]
            z[done], k1[done] = new[accepted], k[-1][accepted]
            factor = (self.safety * error.clamp(min=1e-10) ** -0.2).clamp(self.shrink, self.grow).to(h.dtype)
            # A step cut short by the end of the piece says nothing against the longer one.
            proposed = torch.where(arrived, torch.maximum(step[rows], h * factor), h * factor)
            step[rows] = torch.where(accepted, proposed, h * factor.clamp(max=1.0))
            rows = rows[~arrived]
            if len(rows) == 0:
                return z, evaluations, step
        raise FloatingPointError(
            f"dopri5 needs more than {MAX_ATTEMPTS} steps between tau = {start:g} and {end:g}; the velocity is too "
            f"rough for atol={atol:g}, rtol={rtol:g}"
        )


def _initial_step(
    velocity: Velocity, z: Tensor, tau: Tensor, k1: Tensor, end: float, atol: float, rtol: float
) -> Tensor:
    """Starting step per image (Hairer, Norsett & Wanner, Solving ODEs I, section II.4), a power of 2; one evaluation.

    The estimate is a small difference, whose last bits depend on what else is in the batch; rounded up, the steps and
    so the image do not.
    """
    scale = atol + rtol * z.abs()
    d0, d1 = _norm(z / scale), _norm(k1 / scale)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).to(tau.dtype).clamp(max=end)
    k2 = velocity((tau + h0).clamp(max=end), advance(z, h0, (1.0,), [k1]), None)
    d2 = _norm((k2 - k1) / scale).to(tau.dtype) / h0
    steepest = torch.maximum(d1.to(tau.dtype), d2)
    h1 = torch.where(steepest <= 1e-15, (h0 * 1e-3).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return torch.minimum(100 * h0, h1).log2().ceil().exp2()


def _norm(x: Tensor) -> Tensor:
    """Root mean square of every image, [B]."""
    return x.flatten(1).pow(2).mean(dim=1).sqrt()
