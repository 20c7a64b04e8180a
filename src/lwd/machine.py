"""What runs have in common: the device, the notes they keep about themselves, a trained run read back."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwd import distributed
from lwd.backbones import LightningDiT, LightningDiTConfig
from lwd.encoders.choose import Decoder, decoder
from lwd.files import read_json, write_json
from lwd.latents import LatentSpec, Normalization
from lwd.objective import Denoiser
from lwd.parallel import Precision, autocast
from lwd.randomness import derived_seed
from lwd.schedules import Schedule, load_schedule


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
    """`pick_device`, where ``"auto"`` under torchrun is this process's own GPU."""
    local = os.environ.get("LOCAL_RANK")
    chosen = pick_device(name)
    return pick_device(f"cuda:{local}") if chosen.type == "cuda" and name == "auto" and local else chosen


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


def initial_denoiser(backbone: LightningDiTConfig, seed: int) -> LightningDiT:
    """A fresh network whose weights depend on the seed alone."""
    torch.manual_seed(derived_seed(seed, "weights"))
    return LightningDiT(backbone)


def write_run_config(directory: Path, device: torch.device, **settings: Any) -> None:
    """``config.json``: command, settings, machine, versions; written by the first process."""
    if distributed.rank() != 0:
        return
    plain = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
        for name, value in settings.items()
    }
    described = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "settings": plain,
    }
    write_json(directory / "config.json", json.loads(json.dumps(described)))


@dataclass(frozen=True)
class TrainedRun:
    """A trained denoiser with everything that sampling from it needs."""

    denoiser: Denoiser
    config: LightningDiTConfig
    parameters: int
    schedule: Schedule
    normalization: Normalization
    encoders: dict[str, Any]

    @property
    def spec(self) -> LatentSpec:
        return self.config.spec

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.input_size, self.config.input_size

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [N, c, H, W] from normalised composite latents, by the texture group's decoder."""
        return decode_texture(latents, self.spec, self.normalization, self.encoders)


def load_run(
    directory: Path, device: torch.device, *, snapshot: int | None = None, precision: Precision | None = None
) -> TrainedRun:
    """What `lwd train` left in `directory`, or the averaged weights it kept after step `snapshot`.

    Raises:
        FileNotFoundError: no finished run there, or no such snapshot.
        ValueError: a damaged file; a schedule for other groups than the network's.
    """
    if not (directory / "model" / "config.json").exists():
        raise FileNotFoundError(f"{directory} holds no finished run (no model/); train it with `lwd train`")
    model = LightningDiT.from_pretrained(directory / "model")
    if snapshot is not None:
        from safetensors.torch import load_file

        path = directory / "snapshots" / f"{snapshot:08}.safetensors"
        if not path.exists():
            kept = sorted(int(file.stem) for file in path.parent.glob("*.safetensors"))
            raise FileNotFoundError(f"{directory} kept no snapshot of step {snapshot}, only of {kept}")
        model.load_state_dict(load_file(path), strict=False)
    model = model.to(device)
    latents = read_json(directory / "latents.json")
    return TrainedRun(
        denoiser=_inference(model, device, precision or default_precision(device)),
        config=model.config,
        parameters=sum(p.numel() for p in model.parameters()),
        schedule=load_schedule(directory / "schedule.json", model.spec.names).frozen().to(device),
        normalization=Normalization.from_dict(latents["normalization"]),
        encoders=latents["encoders"],
    )


def _inference(model: LightningDiT, device: torch.device, precision: Precision) -> Denoiser:
    class Inference:
        spec, null_label = model.spec, model.null_label

        def __call__(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad(), autocast(precision, device):
                return model(z, t, labels)

    return Inference()


def decode_texture(latents: Tensor, spec: LatentSpec, normalization: Normalization, encoders: dict[str, Any]) -> Tensor:
    """Images uint8 [N, c, H, W] from normalised composite latents.

    Raises:
        ValueError: the texture group's encoder is one that cannot be decoded.
    """
    texture = spec.split(normalization.denormalize(latents.float()))[0]
    return _decoder(json.dumps(encoders.get(spec.names[0], {})), latents.device).decode(texture).cpu()


@lru_cache(maxsize=2)
def _decoder(description: str, device: torch.device) -> Decoder:
    return decoder(json.loads(description), device)


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
