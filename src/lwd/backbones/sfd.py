"""Reading checkpoints of Semantic-First Diffusion and LightningDiT.

Their state dict says everything about the sizes except the depth of the REPA projection and how the channels divide
into groups; both can be given.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwd.backbones.config import LightningDiTConfig
from lwd.backbones.lightningdit import LightningDiT
from lwd.latents import Group, LatentSpec

WRAPPERS = ("module.", "_orig_mod.")
CONSTANTS = ("pos_embed", "feat_rope.")
"""Fixed tables that we compute instead of storing."""


def load_sfd(source: str | Path | Mapping[str, Tensor], **overrides: Any) -> LightningDiT:
    """A LightningDiT that computes what the reference computes with these weights, in eval mode.

    Args:
        source: a state dict, or the path of a ``.pt`` or ``.safetensors`` file that holds one, by itself or under
            ``ema`` (preferred) or ``model``.
        overrides: fields of `LightningDiTConfig`, above all ``groups`` (or ``spec``). By default a checkpoint with two
            clocks is two thirds texture and one third semantic with loss weight 2, as all published ones are
            (32 + 16), and one with a single clock is one group. ``repa_depth`` defaults to 2.

    Raises:
        FileNotFoundError, ValueError: no such file; damaged; keys missing, unknown, or of an unsupported variant
            (named); overrides that contradict the weights.
    """
    state = _strip(_read(Path(source)) if isinstance(source, str | Path) else source)
    config = _config_of(state, overrides)
    renamed = {_our_name(key): value for key, value in state.items() if not key.startswith(CONSTANTS)}
    model = LightningDiT(config)
    expected = model.state_dict()
    missing, unknown = sorted(expected.keys() - renamed.keys()), sorted(renamed.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"not an SFD checkpoint we know: missing {_some(missing)}; unknown {_some(unknown)}")
    for name, value in renamed.items():
        if value.shape != expected[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(expected[name].shape)}")
    model.load_state_dict(renamed)
    return model.eval()


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged or not a checkpoint: {error}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error
        raise
    for name in ("ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            return content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no weights: expected 'ema', 'model' or a plain state dict")
    return content


def _strip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that DistributedDataParallel and torch.compile leave."""
    stripped = {}
    for key, value in state.items():
        while key.startswith(WRAPPERS):
            key = key.split(".", 1)[1]
        stripped[key] = value
    return stripped


def _config_of(state: Mapping[str, Tensor], overrides: dict[str, Any]) -> LightningDiTConfig:
    def get(key: str) -> Tensor:
        if key not in state:
            raise ValueError(f"not an SFD or LightningDiT checkpoint: {key!r} is missing")
        return state[key]

    width, channels, patch, _ = get("x_embedder.proj.weight").shape
    depth = 1 + max((int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    if "blocks.0.attn.q_norm.weight" not in state or "blocks.0.mlp.w12.weight" not in state:
        raise ValueError("this LightningDiT variant is not supported: it lacks q/k normalisation or SwiGLU")
    if len(get("blocks.0.adaLN_modulation.1.bias")) != 6 * width:
        raise ValueError("this LightningDiT variant is not supported: modulation without shift")
    if len(get("final_layer.linear.bias")) != patch**2 * channels:
        raise ValueError("this LightningDiT variant is not supported: it predicts a variance too (learn_sigma)")
    clocks = 1 if "t_embedder.mlp.0.weight" in state else 2
    spec = overrides.pop("spec", None)
    if spec is not None:
        overrides.setdefault("groups", spec.groups)
    found: dict[str, Any] = {
        "groups": _default_groups(channels, clocks),
        "input_size": patch * round(get("pos_embed").shape[1] ** 0.5),
        "num_classes": len(get("y_embedder.embedding_table.weight")) - 1,
        "hidden_size": width,
        "depth": depth,
        "num_heads": width // len(state["blocks.0.attn.q_norm.weight"]),
        "patch_size": patch,
        "mlp_ratio": 4.0,
        "clocks": clocks,
        "repa_depth": None,
    }
    if "repa_projector.0.weight" in state:
        found |= {
            "repa_depth": min(2, depth),
            "repa_projector_dim": len(state["repa_projector.0.weight"]),
            "repa_dim": len(get("repa_projector.4.weight")),
        }
    free = {"groups", "repa_depth"}
    for name, value in overrides.items():
        if name in found and name not in free and found[name] != value:
            raise ValueError(f"{name} is {found[name]} in the checkpoint, but {value} was asked for")
    if found["repa_depth"] is None and overrides.get("repa_depth") is not None:
        raise ValueError("the checkpoint has no REPA projector, but repa_depth was given")
    config = found | overrides
    groups: Sequence[Group] | None = config["groups"]
    if groups is None:
        raise ValueError(
            f"cannot tell how {channels} channels divide into texture and semantic: pass groups=(Group('texture', ...), "
            "Group('semantic', ...))"
        )
    if LatentSpec(groups).channels != channels:
        raise ValueError(f"the groups have {LatentSpec(groups).channels} channels, the checkpoint {channels}")
    return LightningDiTConfig(**config)


def _default_groups(channels: int, clocks: int) -> tuple[Group, ...] | None:
    if clocks == 1:
        return (Group("texture", channels),)
    if channels % 3:
        return None
    return Group("texture", 2 * channels // 3, 1.0), Group("semantic", channels // 3, 2.0)


def _our_name(key: str) -> str:
    for theirs, ours in (
        ("x_embedder.proj.", "x_embedder."),
        ("y_embedder.embedding_table.", "y_embedder."),
        ("t_embedder_tex.", "t_embedders.0."),
        ("t_embedder_sem.", "t_embedders.1."),
        ("t_embedder.", "t_embedders.0."),
    ):
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key


def _some(keys: Sequence[str]) -> str:
    return (", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")) or "none"
