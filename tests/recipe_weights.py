"""Weights by recipe: what the reference code was run with when the fixtures were made."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

FIXTURES = Path(__file__).parent / "fixtures"


def load_fixture(name: str) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """The tensors of a fixture, and the keys and shapes of the reference's state dict."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["state_keys"])  # noqa: SIM118


def recipe_weights(shapes: dict[str, list[int]], gain: float = 1.0) -> dict[str, torch.Tensor]:
    """The reference's weights: every tensor drawn from a generator that its name seeds."""
    state = {}
    for key, shape in shapes.items():
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
        r = generator.standard_normal(shape, dtype=np.float32)
        if key.endswith("running_var"):
            value = 1 + 0.1 * abs(r)
        elif key.endswith("running_mean"):
            value = 0.05 * r
        elif len(shape) == 1:
            value = 1 + 0.1 * r if key.endswith("weight") else 0.05 * r
        else:
            value = gain * r / math.sqrt(math.prod(shape[1:]))
        state[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state
