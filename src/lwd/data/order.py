"""The order of training images as a pure function of the step."""

from __future__ import annotations

import torch
from torch import Tensor

from lwd.randomness import stream


class BatchOrder:
    """Batches cut from the endless row of epochs, each a seeded permutation of all images.

    Every image comes exactly once per epoch; a batch may straddle two epochs, so nothing is dropped. The permutations
    in use are cached, but nothing else is remembered: resuming needs the step number only.

    Args:
        count: images.
        batch_size: of the global batch.
        rank, world: the process's part of each batch: the `rank`-th of `world` equal ones. Together the parts are the
            batch of a single process, so images are neither repeated nor left out, whatever `count` is.

    Raises:
        ValueError: nothing to draw from; a batch that the processes cannot share evenly.
    """

    def __init__(self, count: int, batch_size: int, seed: int, *, rank: int = 0, world: int = 1) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"there must be images and a batch size of at least 1, not {count} and {batch_size}")
        if not 0 <= rank < world or batch_size % world:
            raise ValueError(
                f"{world} processes cannot share a batch of {batch_size} evenly (this is rank {rank}); choose a number "
                "of processes that divides it"
            )
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._part = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        self._epochs: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """This process's images of step `step` (from 0), [batch_size / world]."""
        if step < 0:
            raise ValueError(f"steps count from 0, not {step}")
        begin, end = step * self.batch_size + self._part.start, step * self.batch_size + self._part.stop
        first, last = begin // self.count, (end - 1) // self.count
        self._epochs = {
            epoch: self._epochs[epoch] if epoch in self._epochs else self._permutation(epoch)
            for epoch in range(first, last + 1)
        }
        parts = [
            permutation[max(begin - epoch * self.count, 0) : end - epoch * self.count]
            for epoch, permutation in self._epochs.items()
        ]
        return parts[0] if first == last else torch.cat(parts)

    def flips(self, step: int) -> Tensor:
        """Which of them are mirrored, [batch_size / world] bool, half on average."""
        return (torch.rand(self.batch_size, generator=stream(self.seed, "flip", step)) < 0.5)[self._part]

    def _permutation(self, epoch: int) -> Tensor:
        return torch.randperm(self.count, generator=stream(self.seed, "epoch", epoch))
