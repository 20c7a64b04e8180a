"""Shifted clocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwd.schedules.base import LocalTimes, Schedule


class ShiftedSchedule(Schedule):
    """Time-shifted clocks (Latent Forcing, arXiv 2602.11401): t_g = a_g tau / (1 + (a_g - 1) tau).

    Args:
        shifts: a_g > 0 for every group; above 1 a group leads the global clock, below 1 it follows.

    Raises:
        ValueError: a shift that is not positive and finite; not one for each group.
    """

    kind = "shifted"

    def __init__(
        self, shifts: Sequence[float] = (1.0, 3.0), groups: int | None = None, names: Sequence[str] | None = None
    ) -> None:
        super().__init__(len(shifts), names)
        if groups not in (None, self.groups):
            raise ValueError(f"{self.groups} shifts for {groups} groups")
        if not all(a > 0 and math.isfinite(a) for a in shifts):
            raise ValueError(f"shifts must be positive and finite, not {tuple(shifts)}")
        self.shifts = tuple(float(a) for a in shifts)

    def local_times(self, tau: Tensor) -> LocalTimes:
        (a,), s = self._constants(tau, torch.tensor(self.shifts, dtype=torch.float64)), tau[:, None]
        denominator = a * s + (1 - s)  # = 1 + (a - 1) tau, written so that t(1) = a / a
        return LocalTimes(a * s / denominator, a / denominator**2)

    def parameters_dict(self) -> dict[str, Any]:
        return {"shifts": list(self.shifts)}
