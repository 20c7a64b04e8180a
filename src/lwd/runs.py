"""Directories of runs: the notes they keep about themselves, and the averaged weights that are in them."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lwd import distributed
from lwd.backbones import LightningDiT, LightningDiTConfig
from lwd.checkpoints import Checkpoints
from lwd.files import read_json, sha256_of, write_json
from lwd.machine import describe_machine, describe_versions
from lwd.randomness import derived_seed


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


def note_step(model: Path, step: int) -> None:
    """Leave beside the weights in `model` after which step they are; they outlive the settings of the run."""
    if not (model / "model.safetensors").is_file():
        return  # a network that saves itself in its own way
    write_json(model / "trained.json", {"step": step, "sha256": sha256_of(model / "model.safetensors")})


def steps_kept(directory: Path) -> list[int]:
    """The steps of a run whose averaged weights can be read, in order; not that of the finished model."""
    snapshots = {int(path.stem) for path in (directory / "snapshots").glob("*.safetensors")}
    return sorted(snapshots | set(Checkpoints(directory).steps()))


def read_run(directory: Path, step: int | None) -> tuple[LightningDiT, dict[str, Any]]:
    """The averaged network of a run after `step` (None: at its end), on the CPU, and where it comes from: recipe,
    step, batch size, hash of the file of weights.

    Raises:
        FileNotFoundError: no run there, it is not finished, or it kept nothing of that step.
        ValueError: a damaged file, or weights that do not fit.
    """
    final, kept = directory / "model", steps_kept(directory)
    exported = (final / "config.json").is_file()
    if not exported and not kept:
        raise FileNotFoundError(
            f"{directory} holds no finished run (no model/) and no checkpoint; train it with `lwd train`"
        )
    about = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    settings = about.get("settings", {})
    planned = settings.get("train", {})
    origin = {
        "recipe": settings.get("recipe"),
        "batch_size": planned.get("batch_size"),
        "train_seed": planned.get("seed"),
    }
    digest = sha256_of(final / "model.safetensors") if exported else ""
    noted = final / "trained.json"
    note = read_json(noted) if noted.is_file() else {"step": planned.get("steps"), "sha256": digest}
    # A run that was made longer still has the model of its former end; in one that was cut off while it wrote the new
    # model, the weights are not those of the note.
    end = note["step"] if exported and note["sha256"] == digest else -1
    if step is None and (end == -1 or end != planned.get("steps", end)):
        have = sorted({*kept, end} - {-1})
        raise FileNotFoundError(f"{directory} is not finished; its weights can be had of the steps {have}")
    if end != -1 and step in (None, end):
        return LightningDiT.from_pretrained(final), origin | {"step": end, "model_sha256": digest}
    if step is None or step not in kept:
        raise FileNotFoundError(f"{directory} kept nothing of step {step}, only of {kept}")
    described = read_json(final / "config.json") if exported else settings.get("backbone")
    if described is None:
        raise FileNotFoundError(f"{directory / 'config.json'} does not say what network this run trains")
    model = LightningDiT(LightningDiTConfig.from_dict(described))
    snapshot = directory / "snapshots" / f"{step:08}.safetensors"
    weights = _read(snapshot) if snapshot.is_file() else _average(directory, step, model)
    # What was not trained (a projector without REPA) is not averaged.
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown or not weights:
        raise ValueError(f"the weights of step {step} in {directory} are not of its network: {', '.join(unknown[:5])}")
    return model.eval(), origin | {"step": step, "model_sha256": sha256_of(snapshot) if snapshot.is_file() else None}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); choose another step") from error


def _average(directory: Path, step: int, model: LightningDiT) -> dict[str, Tensor]:
    """The averaged weights in a resumable checkpoint, whatever number of processes wrote it."""
    from torch.distributed.checkpoint import FileSystemReader

    path = Checkpoints(directory).path(step)
    try:
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); choose another step") from error
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    names = [key.removeprefix("average.") for key in stored if key.startswith("average.")]
    state = {"average": {name: torch.empty(shapes[name]) for name in names if name in shapes}}
    return Checkpoints(directory).load(step, state)["average"]  # type: ignore[no-any-return]
