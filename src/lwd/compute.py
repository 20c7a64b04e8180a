"""How a network computes, in training and in sampling: its precision, and compilation."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import nn

Precision = Literal["float32", "bf16"]


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def compile_blocks(network: nn.Module, *, dynamic: bool | None = False) -> None:
    """Compile `network` in place, block by block where it has blocks.

    Args:
        dynamic: False for one size of batch; None also for others, as an adaptive solver has them when images arrive.

    They are alike, so one compilation serves all: seconds in place of a minute for the network as one graph, which then
    runs 2 % faster (`docs/results/speed.md`).
    """
    for part in getattr(network, "blocks", None) or [network]:
        part.compile(dynamic=dynamic)
