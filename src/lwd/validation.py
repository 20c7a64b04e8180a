"""A loss on held-out latents that can be compared across schedules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lwd.batches import LatentSource
from lwd.interpolant import interpolate, target_velocity
from lwd.objective import Denoiser
from lwd.randomness import stream
from lwd.schedules import Schedule

HORIZON = 0.98
"""Where the integral over local times ends; the weight t / (1 - t) grows without bound towards 1."""


class Validation:
    """The errors of a denoiser on held-out latents, by group and local time, always with the same noise.

    The training loss of two schedules cannot be compared: each weighs the states that it visits. What can is

        1/D sum_g d_g integral over the path of t_g / (1 - t_g) l_g dt_g,

    the loss in the weights of information. For the exact denoiser it is the mutual information between data and state,
    in nats per dimension, which depends on the end of the path alone (Guo et al. 2005, 1/2 mmse d snr); so what two
    schedules differ by is what the networks trained on them have left to learn.

    Args:
        data: held-out latents, normalised as the training latents are.
        images: how many of them, drawn at random, but always the same: sets are often sorted by class.
        points: values of tau, at the midpoints of equal intervals.
    """

    def __init__(
        self, data: LatentSource, schedule: Schedule, *, images: int = 256, points: int = 20, batch: int = 64
    ) -> None:
        self.data, self.schedule = data, schedule
        self.images = torch.randperm(len(data), generator=stream(0, "held-out images"))[:images]
        self.points, self.batch = points, batch

    @torch.no_grad()
    def measure(self, denoiser: Denoiser, device: torch.device) -> dict[str, Any]:
        """``validation``, the number above, and ``validation_<group>``: l_g at every point of tau."""
        spec = self.data.spec
        tau = (torch.arange(self.points, device=device) + 0.5) / self.points
        errors = torch.zeros(self.points, len(spec), device=device)
        for start in range(0, len(self.images), self.batch):
            batch = self.data.gather(self.images[start : start + self.batch])
            x1, labels = batch.latents.to(device), batch.labels.to(device)
            x0 = torch.randn(x1.shape, generator=stream(0, "validation", start, device), device=device)
            for point in range(self.points):
                t = self.schedule(tau[point].repeat(len(x1))).t
                z = interpolate(x0, x1, t, spec)
                error = denoiser(z, t, labels).float() - target_velocity(x0, x1)
                errors[point] += spec.group_mean(error.square()).sum(dim=0)
        errors /= len(self.images)
        times = self.schedule(torch.linspace(0, 1, self.points + 1, device=device)).t.clamp(max=HORIZON).double()
        gained = (errors.double() * _weight(times[:-1], times[1:])).sum(dim=0)
        result = {"validation": float((gained * spec.shares(gained)).sum())}
        return result | {f"validation_{name}": errors[:, g].tolist() for g, name in enumerate(spec.names)}


def _weight(begin: Tensor, end: Tensor) -> Tensor:
    """The integral of t / (1 - t) from `begin` to `end`, exactly: -t - log(1 - t)."""
    return (begin - end) + torch.log((1 - begin) / (1 - end))
