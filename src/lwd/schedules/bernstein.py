"""Any monotone curve, smooth, by a few coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwd.schedules.base import LocalTimes, Schedule


class BernsteinSchedule(Schedule):
    """Polynomials in the basis of Bernstein: t_g(tau) = sum_k c_kg C(n, k) tau^k (1 - tau)^(n - k).

    With coefficients that never decrease the curve never does, and with n large enough every monotone curve is
    approached; it is smooth, so that no solver has to stop on the way. The family of Eq. 40-41 lies within, convex
    coefficients being convex curves.

    Args:
        coefficients: c, [n + 1, G], each column from 0 to 1 and never decreasing.

    Raises:
        ValueError: naming the group whose coefficients decrease or miss the ends.
    """

    kind = "bernstein"

    def __init__(
        self,
        coefficients: Sequence[Sequence[float]] | Tensor,
        groups: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.coefficients = torch.as_tensor(coefficients, dtype=torch.float64)
        if self.coefficients.ndim != 2 or len(self.coefficients) < 2:
            raise ValueError(f"coefficients are of shape [n + 1, G] with n >= 1, not {list(self.coefficients.shape)}")
        super().__init__(self.coefficients.shape[1], names)
        if groups not in (None, self.groups):
            raise ValueError(f"the curve has {self.groups} columns for {groups} groups")
        for group, name in enumerate(self.names):
            c = self.coefficients[:, group]
            if c[0] != 0 or c[-1] != 1 or not (c.diff() >= 0).all():
                raise ValueError(
                    f"the coefficients of {name!r} must run from 0 to 1 and never decrease, not {c.tolist()}"
                )

    def local_times(self, tau: Tensor) -> LocalTimes:
        n = len(self.coefficients) - 1
        values, basis, slopes, lower = self._constants(
            tau, self.coefficients, _binomials(n), n * self.coefficients.diff(dim=0), _binomials(n - 1)
        )
        return LocalTimes(_sum(values, basis, tau).clamp(0, 1), _sum(slopes, lower, tau))

    def parameters_dict(self) -> dict[str, Any]:
        return {"coefficients": self.coefficients.tolist()}


def _binomials(n: int) -> Tensor:
    return torch.tensor([math.comb(n, k) for k in range(n + 1)], dtype=torch.float64)


def _sum(coefficients: Tensor, binomials: Tensor, tau: Tensor) -> Tensor:
    """sum_k c_kg C(n, k) tau^k (1 - tau)^(n - k), [B, G]; exactly one term counts at either end."""
    n = len(binomials) - 1
    k = torch.arange(n + 1, device=tau.device, dtype=tau.dtype)
    basis = binomials * tau[:, None] ** k * (1 - tau[:, None]) ** (n - k)
    # Not a matrix product: that would run in bfloat16 under autocast, and in TF32 where that is on.
    return (basis[:, :, None] * coefficients).sum(dim=1)
