"""Schedules of straight lines: measured ones, synchronous, SFD's offset, cascaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwd.schedules.base import LocalTimes, Schedule


class PiecewiseLinearSchedule(Schedule):
    """Straight lines between knots: any measured or hand-drawn schedule, and the base of the fixed ones below.

    Args:
        tau: global times of the knots, [K], strictly increasing from 0 to 1.
        t: local times at the knots, [K, G], each column from 0 to 1 and never decreasing.

    Raises:
        ValueError: naming the knot and group at which the curve is not monotone or misses its ends.
    """

    kind = "piecewise_linear"

    def __init__(
        self,
        tau: Sequence[float],
        t: Sequence[Sequence[float]],
        groups: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._knots = torch.as_tensor(tau, dtype=torch.float64)
        self._values = torch.as_tensor(t, dtype=torch.float64)
        if self._values.ndim != 2 or self._knots.ndim != 1 or len(self._values) != len(self._knots):
            raise ValueError(
                f"knots tau of shape {tuple(self._knots.shape)} need local times t of shape [K, G], "
                f"not {tuple(self._values.shape)}"
            )
        super().__init__(self._values.shape[1], names)
        if groups not in (None, self.groups):
            raise ValueError(f"the curve has {self.groups} columns for {groups} groups")
        if len(self._knots) < 2 or self._knots[0] != 0 or self._knots[-1] != 1 or (self._knots.diff() <= 0).any():
            raise ValueError("knots tau must increase strictly from 0 to 1")
        self._check_monotone()
        slopes = self._values.diff(dim=0) / self._knots.diff()[:, None]
        self._slopes = slopes
        jumps = (slopes.diff(dim=0).abs() > 1e-9).any(dim=1)
        self.kinks = tuple(self._knots[1:-1][jumps].tolist())

    def _check_monotone(self) -> None:
        for group, name in enumerate(self.names):
            curve = self._values[:, group]
            if curve[0] != 0 or curve[-1] != 1 or not curve.isfinite().all():
                raise ValueError(f"the local time of {name!r} must run from 0 to 1, not {curve[0]:g} to {curve[-1]:g}")
            if (curve.diff() < 0).any():
                k = int((curve.diff() < 0).nonzero()[0, 0])
                raise ValueError(
                    f"the local time of {name!r} runs backwards: {curve[k]:g} at tau = {self._knots[k]:g}, then "
                    f"{curve[k + 1]:g} at tau = {self._knots[k + 1]:g}; a schedule must be monotone"
                )

    def local_times(self, tau: Tensor) -> LocalTimes:
        knots, values, slopes = self._constants(tau, self._knots, self._values, self._slopes)
        piece = torch.bucketize(tau, knots[1:-1], right=True)
        left, right = knots[piece], knots[piece + 1]
        # lerp is exact at both ends, so t(0) = 0 and t(1) = 1 in every precision.
        # Two knots can round to one in float32: then the piece is its end.
        fraction = torch.where(right > left, (tau - left) / (right - left), 1.0)
        t = torch.lerp(values[piece], values[piece + 1], fraction[:, None])
        return LocalTimes(t, slopes[piece])

    def parameters_dict(self) -> dict[str, Any]:
        return {"tau": self._knots.tolist(), "t": self._values.tolist()}


class SynchronousSchedule(PiecewiseLinearSchedule):
    """All groups on one clock, t_g = tau: LightningDiT and ReDi."""

    kind = "synchronous"

    def __init__(self, groups: int = 2, names: Sequence[str] | None = None) -> None:
        super().__init__([0.0, 1.0], [[0.0] * groups, [1.0] * groups], names=names)

    def parameters_dict(self) -> dict[str, Any]:
        return {}


class OffsetSchedule(PiecewiseLinearSchedule):
    """Semantic-First Diffusion (arXiv 2512.04926): every group starts `delta` after the next one, in units of one
    group's own duration:

        t_sem = min(1, (1+delta) tau),   t_tex = max(0, (1+delta) tau - delta)

    A group that has not started or has finished rests (dt = 0). delta = 0.3 in SFD; 0 is synchronous, 1 a cascade.

    Raises:
        ValueError: `delta` negative or not finite.
    """

    kind = "offset"

    def __init__(self, delta: float = 0.3, groups: int = 2, names: Sequence[str] | None = None) -> None:
        if not (delta >= 0 and math.isfinite(delta)):
            raise ValueError(f"delta is a delay and cannot be {delta}")
        self.delta = delta
        total = 1 + (groups - 1) * delta
        delays = [(groups - 1 - g) * delta for g in range(groups)]
        knots = sorted({0.0, 1.0, *(d / total for d in delays), *((d + 1) / total for d in delays if d + 1 < total)})

        # 0 and 1 are set, not computed: total * tau - d need not round to them, and a resting group must not creep.
        def local(tau: float, d: float) -> float:
            if tau <= d / total:
                return 0.0
            return 1.0 if tau >= (d + 1) / total else min(1.0, max(0.0, total * tau - d))

        super().__init__(knots, [[local(tau, d) for d in delays] for tau in knots], names=names)

    def parameters_dict(self) -> dict[str, Any]:
        return {"delta": self.delta}


class CascadedSchedule(PiecewiseLinearSchedule):
    """One group after the other, each alone on the way (Latent Forcing, arXiv 2602.11401), the last group first."""

    kind = "cascaded"

    def __init__(self, groups: int = 2, names: Sequence[str] | None = None) -> None:
        knots = [k / groups for k in range(groups + 1)]
        done = [[1.0 if k >= groups - g else 0.0 for g in range(groups)] for k in range(groups + 1)]
        super().__init__(knots, done, names=names)

    def parameters_dict(self) -> dict[str, Any]:
        return {}
