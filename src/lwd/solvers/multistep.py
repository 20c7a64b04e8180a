"""Linear multistep methods: one evaluation a step, and the earlier ones used again.

Their coefficients depend on the times of the steps alone. They are worked out beforehand on the host in float64, per
group, so that a step on the device is one linear combination that waits for nothing:

    z_g(tau_{k+1}) = A_kg z_g(tau_k) + sum_j B_kjg h_g(tau_{k-j})

where h are local velocities (`AdamsBashforth`) or predictions of the data (`ExponentialMultistep`). A group that
rests over a step has A = 1 and B = 0. An earlier value stands for its own group's clock, so every group looks back as
far as its own clock allows; the first step of a smooth piece has nothing to look back to, and is of first order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lwd.solvers.flow import AfterStep, Array, Finite, Flow, times_like

NEAREST = 0.05
"""Nodes of a polynomial lie at least this far apart, as a part of the step to be taken: extrapolating from a nearer
one would magnify the error of the values at least twentyfold."""


@dataclass(frozen=True)
class Coefficients:
    """Of all steps: A [K, G], B [K, J, G] with j = 0 the newest value, and the local times t [K, G] of the values."""

    A: Array
    B: Array
    t: Array

    def on(self, flow: Flow, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same per channel, [K, C, 1, 1] and [K, J, C, 1, 1], on the device: one copy for all steps."""
        k, j, groups = self.B.shape
        stacked = np.concatenate([self.A[:, None], 1 - self.t[:, None], self.B], axis=1)
        per_group = torch.from_numpy(stacked).to(like.dtype).to(like.device)
        per_channel = flow.spec.expand(per_group.view(-1, groups)).view(k, 2 + j, -1, 1, 1)
        return per_channel[:, 0], per_channel[:, 1], per_channel[:, 2:]


@dataclass(frozen=True)
class AdamsBashforth:
    """Adams-Bashforth with steps of any size, order 2 or 3, on each group's own clock.

    z_g' = t_g' v_g is integrated with v_g interpolated by a polynomial in tau, and t_g', which is known, exactly:

        B_kjg = int over the step of t_g'(tau) L_j(tau) dtau

    On straight pieces of a schedule that is the usual method. The order holds where the first steps of each smooth
    piece are short enough, as with cosine spacing (`lwd.placement`); with equal steps the first one, of first order,
    leaves an error of h^2.
    """

    order: int

    def coefficients(self, flow: Flow, times: Sequence[float]) -> Coefficients:
        tau = np.asarray(times, dtype=np.float64)
        h = np.diff(tau)
        x, w = np.polynomial.legendre.leggauss(16)
        points = tau[:-1, None] + h[:, None] * (x + 1) / 2
        t, _ = flow.clocks(tau)
        _, dt = flow.clocks(points.reshape(-1))
        dt = dt.reshape(*points.shape, -1)
        B = np.zeros((len(h), 2 * self.order, t.shape[1]))
        for k in range(len(h)):
            back = _nodes(tau[: k + 1], tau[k + 1], self.order)
            basis = _lagrange(tau[[k - j for j in back]], points[k])
            B[k, back] = np.einsum("jn,n,ng->jg", basis, w * h[k] / 2, dt[k])
        return Coefficients(np.ones_like(t[1:]), B, t[:-1])

    def integrate(
        self, flow: Flow, z: Tensor, times: Sequence[float], after_step: AfterStep | None = None
    ) -> tuple[Tensor, int]:
        """See `FixedSteps`; one evaluation a step."""
        return _integrate(self.coefficients(flow, times), flow, z, times, after_step, predicts_data=False)


@dataclass(frozen=True)
class ExponentialMultistep:
    """DPM-Solver++ with data prediction (Lu et al. 2022, arXiv 2211.01095), multistep, order 2 or 3, every group on its
    own log-SNR clock lambda_g = log(t_g / (1 - t_g)).

    With x1_g = z_g + (1 - t_g) v_g the flow is linear in z but for x1, and from local time s to t

        z_g(t) = (1 - t)/(1 - s) z_g(s) + (1 - t) int e^lambda x1_g(lambda) dlambda

    with x1_g interpolated by a polynomial in lambda_g through its last values, and that integrated exactly (the paper's
    2M rounds the second coefficient to leading order). The clock has no ends: from t = 0 (lambda = -inf) and to t = 1
    (+inf) a step is of first order, which is Euler's and DDIM's, and a value at t = 0 is not looked back to.
    """

    order: int

    def coefficients(self, flow: Flow, times: Sequence[float]) -> Coefficients:
        t, _ = flow.clocks(np.asarray(times, dtype=np.float64))
        steps = len(t) - 1
        A, B = np.ones((steps, t.shape[1])), np.zeros((steps, 2 * self.order, t.shape[1]))
        for g, clock in enumerate(t.T):
            for k in range(steps):
                if clock[k + 1] > clock[k]:
                    A[k, g], B[k, :, g] = self._step(clock[: k + 2])
        return Coefficients(A, B, t[:-1])

    def _step(self, t: Array) -> tuple[float, Array]:
        """A and B of the step from t[-2] to t[-1], one group's clock."""
        s, end = t[-2], t[-1]
        A, B = (1 - end) / (1 - s), np.zeros(2 * self.order)
        with np.errstate(divide="ignore"):
            clock = np.log(t) - np.log1p(-t)
        if not np.isfinite(clock[-2:]).all():
            B[0] = (end - s) / (1 - s)
            return A, B
        back = _nodes(clock[:-1], clock[-1], self.order)
        x, w = np.polynomial.legendre.leggauss(32)
        half = (clock[-1] - clock[-2]) / 2
        points = clock[-2] + half * (x + 1)
        basis = _lagrange(clock[[-2 - j for j in back]], points)
        B[back] = basis @ (w * half * (1 - end) * np.exp(points))
        return A, B

    def integrate(
        self, flow: Flow, z: Tensor, times: Sequence[float], after_step: AfterStep | None = None
    ) -> tuple[Tensor, int]:
        """See `FixedSteps`; one evaluation a step."""
        return _integrate(self.coefficients(flow, times), flow, z, times, after_step, predicts_data=True)


def _integrate(
    coefficients: Coefficients,
    flow: Flow,
    z: Tensor,
    times: Sequence[float],
    after_step: AfterStep | None,
    *,
    predicts_data: bool,
) -> tuple[Tensor, int]:
    A, remaining, B = coefficients.on(flow, z)
    used = (coefficients.B != 0).any(axis=2)
    history: deque[Tensor] = deque(maxlen=used.shape[1])
    finite = Finite()
    for k, following in enumerate(times[1:]):
        v = flow.local_velocity(times_like(times[k], z), z)
        history.appendleft(torch.addcmul(z, remaining[k], v) if predicts_data else v)
        z = A[k] * z
        for j in used[k].nonzero()[0]:
            z.addcmul_(B[k, j], history[j])
        finite.watch(following, z)
        if after_step is not None:
            after_step(following, z)
    finite.require()
    return z, len(times) - 1


def _nodes(clock: Array, end: float, order: int) -> list[int]:
    """How far back the values lie that a step from clock[-1] to `end` interpolates, newest (0) first."""
    back, nearest = [0], NEAREST * (end - clock[-1])
    for j in range(1, min(len(clock), 2 * order)):
        gap = clock[-1 - back[-1]] - clock[-1 - j]
        if len(back) < order and nearest <= gap < np.inf:
            back.append(j)
    return back


def _lagrange(nodes: Array, x: Array) -> Array:
    """The basis polynomials L_j of `nodes` at x, [J, N]."""
    basis = np.ones((len(nodes), len(x)))
    for j, node in enumerate(nodes):
        for other in np.delete(nodes, j):
            basis[j] *= (x - other) / (node - other)
    return basis
