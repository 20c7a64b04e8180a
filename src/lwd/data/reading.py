"""Reading images ahead: threads decode and crop the next batches while the present one is encoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lwd.data.images import ImageError, ImageSource, crop_to_array


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Attributes:
        size: pixels per side after ADM's centre crop.
        channels: 3 for colour, 1 for grey.
        skip_corrupt: go on without images that cannot be read, instead of stopping.
        batch: images at a time.
        workers: threads that read.
    """

    size: int
    channels: int = 3
    skip_corrupt: bool = False
    batch: int = 64
    workers: int = 8

    def batches(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        """`indices` cut into batches."""
        return (indices[start : start + self.batch] for start in range(0, len(indices), self.batch))


@dataclass(frozen=True)
class ReadBatch:
    """Some images.

    Attributes:
        indices: of those that could be read.
        images: their pixels, uint8 [n, c, S, S].
        failed: the others, with what was wrong.
    """

    indices: list[int]
    images: Tensor
    failed: dict[int, ImageError]


def read_batches(
    source: ImageSource, batches: Iterable[Sequence[int]], reading: Reading, ahead: int = 3
) -> Iterator[ReadBatch]:
    """The images of every batch in turn, up to `ahead` batches read in advance.

    Raises:
        ImageError: an image that cannot be read, unless those are skipped.
    """

    def read(index: int) -> Tensor | ImageError:
        try:
            image = source.read(index)
        except ImageError as error:
            return error
        try:
            return crop_to_array(image, reading.size, reading.channels)
        except ImageError as error:
            return ImageError(f"{source.names[index]}: {error}")

    with ThreadPoolExecutor(reading.workers, "lwd-reader") as readers:
        waiting: deque[list[tuple[int, Future[Tensor | ImageError]]]] = deque()
        try:
            for batch in batches:
                waiting.append([(index, readers.submit(read, index)) for index in batch])
                if len(waiting) > ahead:
                    yield _collect(waiting.popleft(), reading)
            while waiting:
                yield _collect(waiting.popleft(), reading)
        finally:
            readers.shutdown(wait=False, cancel_futures=True)


def _collect(reads: Sequence[tuple[int, Future[Tensor | ImageError]]], reading: Reading) -> ReadBatch:
    indices, images, failed = [], [], {}
    for index, future in reads:
        result = future.result()
        if isinstance(result, ImageError):
            if not reading.skip_corrupt:
                raise result
            failed[index] = result
        else:
            indices.append(index)
            images.append(result)
    empty = torch.empty(0, reading.channels, reading.size, reading.size, dtype=torch.uint8)
    return ReadBatch(indices, torch.stack(images) if images else empty, failed)
