"""Many files as one range of memory, so that rows spread over all of them are gathered by one native call.

A batch of 256 images from a thousand shards touches some 250 of them: a loop over shards would be a loop over images.
Here the shards are mapped side by side into one reserved range of addresses; a row is then nothing but an offset.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_UNITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}  # words of 8 bytes are copied no faster
_MAP_FIXED = 0x10  # the same on Linux and macOS; the mmap module does not export it
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_MADV_WILLNEED = 3
_PIDFD_OPEN, _PROCESS_MADVISE = 434, 440  # Linux system calls of every architecture
_IOV_MAX = 1024


class MappedFiles:
    """`files`, read-only, at consecutive page-aligned offsets of one address range.

    Where there is no POSIX `mmap` the files are read into memory instead.

    Attributes:
        starts: offset of every file, in bytes.
        size: bytes of the whole range.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        sizes = [file.stat().st_size for file in files]
        pages = [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]
        *self.starts, self.size = itertools.accumulate(pages, initial=0)
        if os.name == "posix":
            self._bytes = _map_side_by_side(files, sizes, self.starts, self.size)
        else:
            self._bytes = torch.zeros(self.size, dtype=torch.uint8)
            for file, size, start in zip(files, sizes, self.starts, strict=True):
                self._bytes[start : start + size] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)

    def gather(self, offsets: Tensor, out: Tensor, alignment: int) -> None:
        """Copy the rows that begin at `offsets` [B] (bytes) into `out` [B, ...], one row each.

        Args:
            out: its rows must be contiguous; as a whole it may be a slice of wider rows.
            alignment: bytes that divide all offsets; words of so many are copied.
        """
        rows = out.flatten(1) if out.ndim > 1 else out[:, None]
        row_bytes, step, first = (
            n * rows.element_size() for n in (rows.shape[1], rows.stride(0), rows.storage_offset())
        )
        unit = math.gcd(4, alignment, row_bytes, step, first)
        width = row_bytes // unit
        # Every position of the range as the possible beginning of a row: overlapping rows, of which some are chosen.
        source = self._bytes[: self.size // unit * unit].view(_UNITS[unit])
        windows = source.as_strided((len(source) - width + 1, width), (1, 1))
        torch.index_select(windows, 0, offsets // unit, out=rows.view(_UNITS[unit]))

    def array(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A view of the array at `offset`; it must not be written to."""
        part = self._bytes[offset : offset + math.prod(shape) * dtype.itemsize]
        # Arrays of files made elsewhere may be misaligned; only then is there a copy.
        aligned = part if part.data_ptr() % dtype.itemsize == 0 else part.clone()
        return aligned.view(dtype).view(*shape)

    def will_need(self, offsets: Tensor, row_bytes: int) -> None:
        """Let the system read the rows at `offsets` [B] from the disk in the background, exactly these.

        Without it each access to a cold page waits for the disk, and reads whatever the system guesses around it.
        Does nothing where the system call is missing (before Linux 5.10, elsewhere).
        """
        if (pidfd := _own_pidfd()) is None:
            return
        addresses = offsets + self._bytes.data_ptr()
        begins = addresses // mmap.PAGESIZE * mmap.PAGESIZE
        ranges = torch.stack([begins, addresses + row_bytes - begins], dim=1)
        for part in ranges.split(_IOV_MAX):
            vector, length = ctypes.c_void_p(part.data_ptr()), ctypes.c_ulong(len(part))
            _libc().syscall(_PROCESS_MADVISE, pidfd, vector, length, _MADV_WILLNEED, 0)


def _map_side_by_side(files: Sequence[Path], sizes: Sequence[int], starts: Sequence[int], total: int) -> Tensor:
    libc = _libc()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    base = libc.mmap(None, max(total, 1), 0, flags, -1, 0)
    if base == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"cannot reserve {total / 1e9:.1f} GB of addresses for {len(files)} files")
    array = (ctypes.c_char * max(total, 1)).from_address(base)
    weakref.finalize(array, libc.munmap, base, max(total, 1))  # when the last tensor that looks at it is gone
    for file, size, start in zip(files, sizes, starts, strict=True):
        if not size:
            continue
        descriptor = os.open(file, os.O_RDONLY)
        try:
            place = libc.mmap(base + start, size, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0)
        finally:
            os.close(descriptor)
        if place != base + start:
            raise OSError(ctypes.get_errno(), f"cannot map {file}: {os.strerror(ctypes.get_errno())}")
    return torch.frombuffer(array, dtype=torch.uint8)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.syscall.restype = ctypes.c_long
    return libc


@functools.cache
def _pidfd_of(process: int) -> int | None:
    descriptor = _libc().syscall(_PIDFD_OPEN, process, 0) if sys.platform == "linux" else -1
    return descriptor if descriptor >= 0 else None


def _own_pidfd() -> int | None:
    return _pidfd_of(os.getpid())  # a forked worker has another
