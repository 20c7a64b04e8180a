"""The learned family of schedules (LWD Eq. 40-42)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lwd.schedules.base import LocalTimes, Schedule


class PolynomialSchedule(Schedule):
    """The learnable convex monotone family of Eq. 40-41.

    The last group is the global clock (Eq. 17); every other follows the next one through its own curve f, so a
    chain t_G = tau, t_g = f_g(t_{g+1}) keeps the order t_1 <= ... <= t_G (Eq. 42, 19) for any number of groups:

        f'(s) = 1/Z sum_m a_m s^m,   f(s) = 1/Z sum_m a_m/(m+1) s^(m+1),   a = softplus(rho),   Z = sum_m a_m/(m+1)

    Args:
        degree: M, the degree of f'. M = 4 in the paper.
        rho: initial parameters [G-1, M+1] (or [M+1] for two groups); by default close to the identity, with
            f(1/2) = 0.492 at M = 4.

    Raises:
        ValueError: fewer than two groups, a degree below 1, `rho` of another shape or not finite.
    """

    kind = "polynomial"
    rho: Tensor

    def __init__(
        self,
        degree: int = 4,
        rho: Tensor | Sequence[Any] | None = None,
        groups: int = 2,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(groups, names)
        if groups < 2:
            raise ValueError("a learned schedule relates at least two groups; for one use SynchronousSchedule(1)")
        if degree < 1:
            raise ValueError(f"degree must be at least 1, not {degree} (degree 0 is the synchronous schedule)")
        self.degree = degree
        if rho is None:
            # softplus^-1(1) for the constant term and a_m = 0.018 for the others.
            rho = torch.tensor([math.log(math.e - 1)] + [-4.0] * degree).repeat(groups - 1, 1)
        values = torch.as_tensor(rho, dtype=torch.float32)
        if values.shape != (groups - 1, degree + 1) and (groups > 2 or values.shape != (degree + 1,)):
            raise ValueError(
                f"rho has shape {tuple(values.shape)}; {groups} groups and degree {degree} need "
                f"[{groups - 1}, {degree + 1}]"
            )
        if not values.isfinite().all():
            raise ValueError("rho contains NaN or infinity, so the curve is not monotone from 0 to 1")
        self.rho = nn.Parameter(values.detach().clone().reshape(groups - 1, degree + 1))

    def local_times(self, tau: Tensor) -> LocalTimes:
        # Far below any rho that learning reaches; it keeps Z from vanishing in float32.
        a = F.softplus(self.rho.to(tau).clamp(min=-80.0)).reshape(self.groups - 1, self.degree + 1)
        t, dt = [tau], [torch.ones_like(tau)]
        for a_g in a.flip(0):
            f, df = _normalised_polynomial(a_g, t[0])
            dt.insert(0, df * dt[0])
            t.insert(0, f)
        return LocalTimes(torch.stack(t, dim=1), torch.stack(dt, dim=1))

    def parameters_dict(self) -> dict[str, Any]:
        return {"degree": self.degree, "rho": self.rho.detach().cpu().tolist()}


def _normalised_polynomial(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """f(s) and f'(s) of Eq. 40-41 for coefficients a [M+1]."""
    integral = a / torch.arange(1, len(a) + 1, device=a.device, dtype=a.dtype)
    # Z is the same Horner sum at s = 1: the very same roundings, so f(1) = 1 exactly and f(s) <= s always.
    Z = _horner(integral, torch.ones_like(s))
    return s * (_horner(integral, s) / Z), _horner(a, s) / Z


def _horner(coefficients: Tensor, s: Tensor) -> Tensor:
    value = coefficients[-1].expand_as(s)
    for coefficient in coefficients[:-1].flip(0):
        value = value * s + coefficient
    return value
