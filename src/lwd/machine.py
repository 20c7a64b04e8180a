"""The machine: which device to use, what it is good at, and how records describe it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lwd.compute import Precision


def pick_device(name: str = "auto") -> torch.device:
    """``"auto"``: CUDA where there is one, else the CPU; otherwise the device named.

    Raises:
        ValueError: the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def own_device(name: str = "auto") -> torch.device:
    """`pick_device`, where ``"auto"`` under torchrun or srun is this process's own GPU. It becomes the current one."""
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    chosen = pick_device(name)
    if chosen.type == "cuda" and name == "auto" and local:
        # srun may show each task its own GPU alone, which then is number 0 to all of them.
        chosen = pick_device(f"cuda:{int(local) % torch.cuda.device_count()}")
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # else every process keeps some memory of the first GPU
    return chosen


def default_compile(device: torch.device) -> bool:
    """Whether compiling pays by default: on a GPU with a C++ compiler at hand. The demo's networks train as fast
    without on a CPU, and compiling them there takes a minute."""
    return device.type == "cuda" and any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++"))


def default_precision(device: torch.device) -> Precision:
    """bf16 where the hardware multiplies it fast, float32 elsewhere."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # A CPU without bf16 instructions emulates them, slower than float32.
    flags = _cpu_flags()
    return "bf16" if device.type == "cpu" and flags & {"avx512_bf16", "amx_bf16", "bf16"} else "float32"


def describe_machine(device: torch.device) -> dict[str, Any]:
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": named,
    }


def describe_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("lwd", "torch", "numpy", "safetensors"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":", 1)[1].split()}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
