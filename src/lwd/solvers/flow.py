"""What solvers integrate, and the arithmetic that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lwd.latents import LatentSpec

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Velocity = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The global velocity V, called as ``velocity(tau [B], z [b, C, H, W], rows)``; `rows` are the images of the batch that
z holds, or None for all of them."""

AfterStep = Callable[[float, Tensor], None]
"""Called with every time that a fixed-step solver reached and the state there."""


class Flow(Protocol):
    """The flow on one smooth piece of a schedule: V itself when called, and what it is made of."""

    @property
    def spec(self) -> LatentSpec: ...

    def __call__(self, tau: Tensor, z: Tensor, rows: Tensor | None, /) -> Tensor: ...

    def local_velocity(self, tau: Tensor, z: Tensor) -> Tensor:
        """v_g of every group, [B, C, H, W], in the dtype of z."""

    def clocks(self, tau: Array) -> tuple[Array, Array]:
        """Local times and their derivatives at `tau` [K], both [K, G], on the host in float64."""


class FixedSteps(Protocol):
    """A solver that takes the steps it is given."""

    def integrate(
        self, flow: Flow, z: Tensor, times: Sequence[float], after_step: AfterStep | None = None
    ) -> tuple[Tensor, int]:
        """z from times[0] to times[-1] with a step between each two, and the number of evaluations per image.

        Raises:
            FloatingPointError: the state became NaN or infinite; says at which time.
        """


class Finite:
    """Watches a state without waiting for the device at every step."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._finite: list[Tensor] = []

    def watch(self, tau: float, z: Tensor) -> None:
        self._times.append(tau)
        self._finite.append(z.isfinite().all())

    def require(self) -> None:
        """FloatingPointError naming the first time at which the state was not finite."""
        for tau, finite in zip(self._times, torch.stack(self._finite).tolist(), strict=True):
            if not finite:
                raise FloatingPointError(f"the state is NaN or infinite at tau = {tau:.4f}")


def combine(h: Tensor | float, weights: Sequence[float], k: Sequence[Tensor]) -> Tensor:
    """h sum_i weights_i k_i, with h one number or one per image."""
    if isinstance(h, Tensor):
        h = h.to(k[0].dtype).view(-1, *[1] * (k[0].ndim - 1))
    total = torch.zeros_like(k[0])
    for weight, k_i in zip(weights, k, strict=True):
        if weight:
            total.add_(k_i, alpha=weight)
    return total * h


def advance(z: Tensor, h: Tensor | float, weights: Sequence[float], k: Sequence[Tensor]) -> Tensor:
    return z + combine(h, weights, k) if weights else z


def time_dtype(z: Tensor) -> torch.dtype:
    """Times are float64 where the device has it: thousands of small steps must still end at exactly 1."""
    return torch.float32 if z.device.type == "mps" else torch.float64


def times_like(tau: float, z: Tensor) -> Tensor:
    """One global time for all images, [B]."""
    return torch.full((len(z),), tau, dtype=time_dtype(z), device=z.device)
