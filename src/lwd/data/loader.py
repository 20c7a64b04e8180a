"""Batches of a latent set on the device that trains, read ahead where reading and training can overlap."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from lwd.data.dataset import LatentDataset
from lwd.data.memory import Batch, StoredBatch, TensorLatents
from lwd.data.order import BatchOrder


def nearest(data: LatentDataset, device: torch.device) -> LatentDataset | TensorLatents:
    """`data` where training reads it fastest: on a GPU with room for it there, else memory-mapped as it is."""
    if device.type != "cuda":
        return data
    free, _ = torch.cuda.mem_get_info(device)
    # Half precision is expanded, so the set may become twice as large; and the training needs its room.
    return data.to_memory(device) if 2 * data.bytes < free / 4 else data


class BatchLoader:
    """The batches of `order`, normalised, on `device`.

    Which batch belongs to which step is a matter of `order` alone; the loader holds nothing that a checkpoint would
    need. For a GPU a thread gathers the next batches into page-locked memory, from where they are copied in the
    background, as they are stored: half precision and 8-bit features cross the bus unexpanded. On a CPU there is no
    thread, for it would take its time from the training; but the system is asked to read ahead from the disk.

    On a CPU a batch is valid until the next but one: fresh memory for each would cost more than filling it.

    Args:
        flips: mirror half of the images, by the seed of `order`.
        ahead: batches to read ahead.
    """

    def __init__(
        self,
        data: LatentDataset,
        order: BatchOrder,
        device: torch.device,
        *,
        flips: bool = False,
        ahead: int = 4,
    ) -> None:
        if ahead < 1:
            raise ValueError(f"at least one batch must be read ahead, not {ahead}")
        self.data, self.order, self.device, self.flips, self.ahead = data, order, device, flips, ahead
        self._executor = ThreadPoolExecutor(1, "lwd-loader") if device.type == "cuda" else None
        self._pending: deque[_Pending] = deque()
        self._memory: deque[tuple[StoredBatch | None, Tensor | None]] = deque([(None, None)] * 2)

    def get(self, step: int) -> Batch:
        """The batch of `step`; fast when it is the one after the last."""
        if not self._pending or self._pending[0].step != step:
            self._pending.clear()
        begin = self._pending[-1].step + 1 if self._pending else step
        for later in range(begin, step + self.ahead + 1):
            self._pending.append(self._start(later))
        pending = self._pending.popleft()
        if pending.gathered is not None:
            return pending.gathered.result().to(self.device, self.data.normalization)
        stored, expanded = self._memory.popleft()
        stored = self.data.gather_stored(pending.indices, pending.flip, out=stored)
        if expanded is None and stored.scales is not None and stored.features is not None:
            expanded = torch.empty(stored.features.shape)
        self._memory.append((stored, expanded))
        return stored.to(self.device, self.data.normalization, expanded)

    def _start(self, step: int) -> _Pending:
        indices, flip = self.order.indices(step), self.order.flips(step) if self.flips else None
        self.data.will_need(indices, flip)
        if self._executor is None:
            return _Pending(step, indices, flip, None)
        # Page-locked memory comes from torch's caching allocator, which waits for copies that still read it.
        return _Pending(step, indices, flip, self._executor.submit(self.data.gather_stored, indices, flip, pinned=True))


class _Pending(NamedTuple):
    step: int
    indices: Tensor
    flip: Tensor | None
    gathered: Future[StoredBatch] | None
