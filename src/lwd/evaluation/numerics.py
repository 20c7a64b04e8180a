"""Float32 that is float32: no TF32, no bfloat16 behind the user's back, whatever the process is set to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_arithmetic(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """Convolutions and matrix products of float32 tensors in full float32 (or TF32), with autocast off.

    cuDNN's convolutions use TF32 unless told otherwise, and ``torch.set_float32_matmul_precision`` may have been
    called by the surrounding program. The settings are as before on leaving.
    """
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn = torch.backends.cudnn
    try:
        with (
            cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.deterministic, allow_tf32=tf32),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
