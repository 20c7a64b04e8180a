"""The order of training images as a pure function of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from lwd.randomness import stream


class BatchOrder:
    """Batches cut from the endless row of epochs, each a seeded permutation of all images.

    Every image comes exactly once per epoch; a batch may straddle two epochs, so nothing is dropped. The permutations
    in use are cached, but nothing else is remembered: resuming needs the step number only.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"there must be images and a batch size of at least 1, not {count} and {batch_size}")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """The images of step `step` (from 0), [batch_size]."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.count
        first, last = int(epochs[0]), int(epochs[-1])
        self._epochs = {
            epoch: self._epochs[epoch] if epoch in self._epochs else self._permutation(epoch)
            for epoch in range(first, last + 1)
        }
        if first == last:
            return self._epochs[first][positions - first * self.count]
        return torch.stack(list(self._epochs.values()))[epochs - first, positions % self.count]

    def flips(self, step: int) -> Tensor:
        """Which images of step `step` are mirrored, [batch_size] bool, half of them on average."""
        return torch.rand(self.batch_size, generator=stream(self.seed, "flip", step)) < 0.5

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.count, generator=stream(self.seed, "epoch", epoch))
