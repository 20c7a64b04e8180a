"""Independent times: no path at all (Diffusion Forcing, Chen et al. 2024, arXiv 2407.01392)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lwd.schedules.base import LocalTimes, Schedule
from lwd.schedules.piecewise import SynchronousSchedule


class IndependentTimes(Schedule):
    """Every group on a clock of its own, to train one denoiser that can be sampled along any schedule.

    Called with global times [B, G], one per group, which are the local times; `clocks` says so to whoever draws them.
    """

    kind = "independent"

    def __init__(self, groups: int = 2, names: Sequence[str] | None = None) -> None:
        super().__init__(groups, names)
        if groups < 2:
            raise ValueError(
                "independent times need at least two groups; one has the times of a SynchronousSchedule(1)"
            )

    @property
    def clocks(self) -> int:
        return self.groups

    def path(self) -> Schedule:
        """The synchronous schedule: no better than others, but never wrong."""
        return SynchronousSchedule(self.groups, self.names)

    def local_times(self, tau: Tensor) -> LocalTimes:
        if tau.ndim == 1:
            raise ValueError(
                "independent times are no path: choose a schedule to go along (--schedule, or Pipeline.along)"
            )
        return LocalTimes(tau, torch.ones_like(tau))

    def inverse(self, t: Tensor, group: int) -> Tensor:
        return t

    def parameters_dict(self) -> dict[str, Any]:
        return {}
