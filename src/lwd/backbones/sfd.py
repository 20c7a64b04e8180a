"""Reading checkpoints of Semantic-First Diffusion and LightningDiT.

Their state dict says everything about the sizes except the depth of the REPA projection and how the channels divide
into groups; both can be given.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lwd.backbones.config import LightningDiTConfig, check_fields
from lwd.backbones.lightningdit import TIME_FREQUENCIES, LightningDiT, check_shapes, rotary_tables, sincos_positions
from lwd.latents import Group, LatentSpec

WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""

TABLES = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
"""Fixed tables that the reference stores and we compute."""


def load_sfd(source: str | Path | Mapping[str, Tensor], **overrides: Any) -> LightningDiT:
    """A LightningDiT that computes what the reference computes with these weights: float32, eval mode, on the CPU.

    Args:
        source: a state dict, or the path of a ``.pt`` or ``.safetensors`` file that holds one, by itself or under
            ``ema`` (preferred) or ``model``. The tensors are copied.
        overrides: fields of `LightningDiTConfig`, above all ``groups`` (or ``spec``, a `LatentSpec`). By default a
            checkpoint with two clocks is two thirds texture and one third semantic with loss weight 2, as all
            published ones are (32 + 16), and one with a single clock is one group. ``repa_depth`` defaults to 2;
            None leaves the REPA projector out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file; keys missing, unknown, or of a variant that is not supported (named); overrides
            that contradict the weights.
    """
    where = "this state dict" if isinstance(source, Mapping) else str(source)
    state = _weights(source if isinstance(source, Mapping) else _read(Path(source)), where)
    try:
        config = _config_of(state, overrides)
        _check_tables(state, config)
        dropped = TABLES if config.repa_depth is not None else (*TABLES, "repa_projector.")
        state = {key: value for key, value in state.items() if not key.startswith(dropped)}
        with torch.device("meta"):
            expected = LightningDiT(config).state_dict()
        ours_of = {_their_name(name, len(config.clock_widths)): name for name in expected}
        check_shapes(state, {theirs: expected[ours].shape for theirs, ours in ours_of.items()})
        return LightningDiT.from_weights(config, {ours_of[key]: value for key, value in state.items()})
    except ValueError as error:
        raise ValueError(f"cannot read {where} as an SFD or LightningDiT checkpoint: {error}") from error


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, because the optimizer's state is most of a training checkpoint and is not read. Namespaces hold the
        # command line in checkpoints of the DiT family.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({str(error).splitlines()[0]}). If you trust it, keep "
            "only the weights: torch.save(torch.load(path, weights_only=False)['ema'], new_path)"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} is truncated or not a checkpoint ({error}); copy or download it again") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    return content


def _weights(content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The state dict, by itself or under ``ema`` or ``model``, without the prefixes of wrappers."""
    content = {str(key): value for key, value in content.items()}
    for name in ("ema", "model"):
        nested = content.get(name)
        flat = {key.removeprefix(f"{name}."): value for key, value in content.items() if key.startswith(f"{name}.")}
        if isinstance(nested, Mapping) or flat:
            content = nested if isinstance(nested, Mapping) else flat
            break
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        raise ValueError(
            f"{where} holds no weights: expected 'ema', 'model' or a plain state dict of tensors, "
            f"found {', '.join(others[:8]) or 'nothing'}"
        )
    stripped = {}
    for key, value in content.items():
        while key.startswith(WRAPPERS):
            key = key.split(".", 1)[1]
        stripped[key] = value
    return stripped


def _config_of(state: Mapping[str, Tensor], overrides: dict[str, Any]) -> LightningDiTConfig:
    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in state:
            raise ValueError(f"{key} is missing; the keys begin with {', '.join(sorted(state)[:3])}")
        if state[key].ndim != rank:
            raise ValueError(f"{key} has shape {tuple(state[key].shape)}, expected {rank} dimensions")
        return tuple(state[key].shape)

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    _check_variant(state, width, patch**2 * channels)
    tokens, head_width = shape("feat_rope.freqs_cos", 2)
    depth = 1 + max((int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    clocks = 1 if any(key.startswith("t_embedder.") for key in state) else 2
    found: dict[str, Any] = {
        "input_size": patch * math.isqrt(tokens),
        "num_classes": shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        "hidden_size": width,
        "depth": depth,
        "num_heads": width // head_width,
        "patch_size": patch,
        "mlp_ratio": _mlp_ratio(width, shape("blocks.0.mlp.w3.weight", 2)[1]),
        "clocks": clocks,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }
    free: dict[str, Any] = {"repa_depth": None}
    if "repa_projector.0.weight" in state:
        found["repa_projector_dim"] = shape("repa_projector.0.weight", 2)[0]
        found["repa_dim"] = shape("repa_projector.4.weight", 2)[0]
        free["repa_depth"] = min(2, depth)
    elif overrides.get("repa_depth") is not None:
        raise ValueError(f"repa_depth={overrides['repa_depth']} was asked for, but it has no REPA projector")

    overrides = dict(overrides)
    if (spec := overrides.pop("spec", None)) is not None:
        if "groups" in overrides:
            raise ValueError("give either spec or groups, not both")
        overrides["groups"] = spec.groups
    check_fields(overrides)
    for name, value in overrides.items():
        if name in found and found[name] != value:
            raise ValueError(f"{name}={value} was asked for, but its tensors have {name}={found[name]}")
    groups = LatentSpec(overrides.pop("groups", None) or _default_groups(channels, clocks))
    if groups.channels != channels:
        raise ValueError(f"the groups {groups.names} have {groups.channels} channels, its tensors {channels}")
    if clocks not in (1, len(groups)):
        raise ValueError(f"it has {clocks} clocks, but {len(groups)} groups were given: {', '.join(groups.names)}")
    return LightningDiTConfig(**{"groups": groups.groups} | free | overrides | found)


def _check_variant(state: Mapping[str, Tensor], width: int, outputs: int) -> None:
    """ValueError for the reference's options that no published checkpoint uses."""

    def length(key: str) -> int:
        return len(state[key]) if key in state else 0

    absent = {
        "feat_rope.freqs_cos": "rotary positions (use_rope)",
        "blocks.0.norm1.weight": "RMSNorm (use_rmsnorm)",
        "blocks.0.mlp.w12.weight": "SwiGLU (use_swiglu)",
    }
    lacking = [f"{what}: no {key}" for key, what in absent.items() if key not in state]
    if length("blocks.0.adaLN_modulation.1.bias") == 4 * width:
        lacking.append("shifts (wo_shift): blocks.0.adaLN_modulation.1.bias has 4 parts instead of 6")
    if length("final_layer.linear.bias") == 2 * outputs:
        lacking.append("a velocity alone (learn_sigma): final_layer.linear.bias has twice the channels")
    frequencies = [key for key in state if re.fullmatch(r"t_embedder\w*\.mlp\.0\.weight", key)]
    if any(state[key].shape[-1] != TIME_FREQUENCIES for key in frequencies):
        lacking.append(f"a time embedding of {TIME_FREQUENCIES} frequencies: {', '.join(frequencies)}")
    if lacking:
        raise ValueError(f"this variant is not supported, it is without {'; '.join(lacking)}")


def _check_tables(state: Mapping[str, Tensor], config: LightningDiTConfig) -> None:
    """ValueError unless the stored tables are the fixed ones of this grid (to half precision)."""
    side = config.input_size // config.patch_size
    cos, sin = rotary_tables(side, config.hidden_size // config.num_heads)
    for name, ours in zip(TABLES, (sincos_positions(side, config.hidden_size), cos, sin), strict=True):
        if name not in state:
            raise ValueError(f"missing: {name}")
        theirs = state[name]
        if theirs.shape != ours.shape or not torch.allclose(theirs.float().cpu(), ours, rtol=0, atol=0.01):
            raise ValueError(
                f"{name} {tuple(theirs.shape)} is not the fixed table {tuple(ours.shape)} of a {side}x{side} grid"
            )


def _mlp_ratio(width: int, hidden: int) -> float:
    """A ratio that gives a SwiGLU of this hidden width: 4, or the nearest, which the reference rounds down."""
    for ratio in (4.0, 1.5 * hidden / width, (1.5 * hidden + 1) / width):
        if int(2 / 3 * int(width * ratio)) == hidden:
            return ratio
    raise ValueError(f"no mlp_ratio gives a SwiGLU of {hidden} hidden units at width {width}")


def _default_groups(channels: int, clocks: int) -> tuple[Group, ...]:
    if clocks == 1:
        return (Group("texture", channels),)
    if channels % 3:
        raise ValueError(
            f"cannot tell how {channels} channels divide into texture and semantic (not 2 : 1): pass "
            "groups=(Group('texture', ...), Group('semantic', ..., weight=2.0))"
        )
    return Group("texture", 2 * channels // 3, 1.0), Group("semantic", channels // 3, 2.0)


def _their_name(name: str, clocks: int) -> str:
    """The reference's name for one of our parameters."""
    texture, semantic = ("t_embedder_tex.", "t_embedder_sem.") if clocks == 2 else ("t_embedder.", "")
    for ours, theirs in (
        ("x_embedder.", "x_embedder.proj."),
        ("y_embedder.", "y_embedder.embedding_table."),
        ("t_embedders.0.", texture),
        ("t_embedders.1.", semantic),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name
