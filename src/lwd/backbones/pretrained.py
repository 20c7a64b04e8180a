"""A network as a directory: config.json and model.safetensors."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lwd.backbones.config import LightningDiTConfig
from lwd.backbones.lightningdit import LightningDiT
from lwd.files import read_json, write_atomically, write_json


def save_pretrained(model: LightningDiT, directory: str | Path) -> Path:
    """Write weights, then configuration; a directory with a configuration is complete."""
    directory = Path(directory)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(directory / "model.safetensors", lambda path: save_file(weights, path))
    write_json(directory / "config.json", model.config.to_dict())
    return directory


def load_pretrained(source: str | Path) -> LightningDiT:
    """The network saved in a directory, or in a repository of the Hugging Face hub, in eval mode.

    Raises:
        FileNotFoundError: neither a directory nor a hub name.
        ValueError: a damaged file, or weights that do not fit the configuration (the tensor is named).
    """
    directory = _download(str(source)) if not Path(source).exists() else Path(source)
    model = LightningDiT(LightningDiTConfig.from_dict(read_json(directory / "config.json")))
    path = directory / "model.safetensors"
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); copy or download it again") from error
    expected = model.state_dict()
    if weights.keys() != expected.keys():
        differing = sorted(weights.keys() ^ expected.keys())
        raise ValueError(f"{path} does not fit config.json beside it: tensors {differing[:6]} are in one of them only")
    for name, value in weights.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(value.shape)}, config.json asks for {tuple(expected[name].shape)}"
            )
    model.load_state_dict(weights)
    return model.eval()


def _download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(f"no model directory {name!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"no directory {name!r}; to look it up on the Hugging Face hub: pip install huggingface_hub"
        ) from error
    return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
