"""Explicit Runge-Kutta methods of fixed steps: Euler, midpoint, Heun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lwd.solvers.flow import AfterStep, Finite, Velocity, advance, times_like


@dataclass(frozen=True)
class RungeKutta:
    """An explicit method by its Butcher tableau: nodes c, coefficients a (row i for stage i), weights b."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    def integrate(
        self, flow: Velocity, z: Tensor, times: Sequence[float], after_step: AfterStep | None = None
    ) -> tuple[Tensor, int]:
        """See `FixedSteps`; takes as many evaluations a step as it has stages."""
        finite = Finite()
        for tau, following in pairwise(times):
            h = following - tau
            k: list[Tensor] = []
            for c, a in zip(self.c, self.a, strict=True):
                k.append(flow(times_like(min(tau + c * h, following), z), advance(z, h, a, k), None))
            z = advance(z, h, self.b, k)
            finite.watch(following, z)
            if after_step is not None:
                after_step(following, z)
        finite.require()
        return z, (len(times) - 1) * len(self.c)


EULER = RungeKutta(c=(0.0,), a=((),), b=(1.0,))
MIDPOINT = RungeKutta(c=(0.0, 0.5), a=((), (0.5,)), b=(0.0, 1.0))
HEUN = RungeKutta(c=(0.0, 1.0), a=((), (1.0,)), b=(0.5, 0.5))
