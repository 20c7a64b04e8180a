"""Float32 that is float32: no TF32, no bfloat16 behind the user's back, whatever the process is set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_arithmetic(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """Convolutions and matrix products of float32 tensors in full float32 (or TF32 on a GPU), with autocast off.

    cuDNN's convolutions use TF32 unless told otherwise, and the surrounding program may have allowed TF32 or
    bfloat16 for products. The settings are as before on leaving.
    """
    backends: Any = torch.backends  # its type stubs lack `mkldnn.matmul` and `mkldnn.conv`
    on_gpu, on_cpu = (backends.cuda.matmul, backends.cudnn.conv), (backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [(operation, operation.fp32_precision) for operation in (*on_gpu, *on_cpu)]
    try:
        for operation, _ in before:
            operation.fp32_precision = "tf32" if tf32 and operation in on_gpu else "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for operation, precision in before:
            operation.fp32_precision = precision
