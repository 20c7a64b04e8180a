"""A network as a directory: config.json and model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lwd.backbones.config import LightningDiTConfig
from lwd.backbones.lightningdit import LightningDiT
from lwd.files import read_json, write_atomically, write_json
from lwd.hub import directory_of


def save_pretrained(model: LightningDiT, directory: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write weights, then configuration; a directory with a configuration is complete.

    Args:
        weights: the state dict to write, where the model's own is spread over processes.
    """
    directory = Path(directory)
    state = model.state_dict() if weights is None else weights
    weights = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_atomically(directory / "model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
    write_json(directory / "config.json", model.config.to_dict())
    return directory


def load_pretrained(source: str | Path) -> LightningDiT:
    """The network saved in a directory, or in a repository of the Hugging Face hub: float32, eval mode, on the CPU.

    Raises:
        FileNotFoundError: neither a directory nor a hub name, or a file is missing in it.
        ValueError: a damaged file, or weights that do not fit the configuration (the tensors are named).
    """
    directory = directory_of(source, ["config.json", "model.safetensors"], "model directory")
    for name in ("config.json", "model.safetensors"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is not a saved LightningDiT: it has no {name}")
    settings, path = read_json(directory / "config.json"), directory / "model.safetensors"
    try:
        config = LightningDiTConfig.from_dict(settings)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); copy or download it again") from error
    try:
        return LightningDiT.from_weights(config, weights)
    except ValueError as error:
        raise ValueError(f"{path} does not fit config.json beside it: {error}") from error
