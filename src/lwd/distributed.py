"""The few lines around torch.distributed. A single process needs no launcher: everything here is the identity then."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def joined(timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Join the processes that torchrun started, for the length of the block. Without torchrun, do nothing.

    Tensors on the CPU travel by gloo, those on GPUs by NCCL; each process uses the GPU of its LOCAL_RANK.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, own_rank, processes = next(iter(dist.rendezvous("env://", timeout=timeout)))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun keeps its store when it restarts the workers, so that one may find the address that another had
        # before. Several machines avoid that with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, see docs/training.md.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=own_rank, world_size=processes, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_(values: Tensor) -> Tensor:
    """`values`, replaced by their mean over the processes."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process; all of them must ask."""
    if world() == 1:
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def from_main(value: Any) -> Any:
    """The first process's `value`, in all of them."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@functools.cache
def background_group() -> dist.ProcessGroup | None:
    """A group for messages of a background thread, which must not get between those of the training."""
    return dist.new_group(backend="gloo") if world() > 1 else None


def wait_for_all() -> None:
    if world() > 1:
        dist.barrier()
