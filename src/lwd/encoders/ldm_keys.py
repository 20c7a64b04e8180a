"""Checkpoints of the LDM autoencoder (Rombach et al. 2022), and of VA-VAE, in the names of diffusers' `AutoencoderKL`.

diffusers' own converter knows autoencoders with attention in the middle only; those of downsampling 16 have it at their
lowest level too, which it drops. Here every tensor finds its place, or the checkpoint is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

OTHERS = re.compile(r"^(loss|model_ema|foundation_model|linear_proj|discriminator|epoch|global_step)\b")
"""What training left in a checkpoint beside the autoencoder."""

_RENAMED = (
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.", r".\1_blocks.\2."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def is_ldm(state: Mapping[str, Any]) -> bool:
    """Whether `state` is in LDM's names."""
    return any(key.startswith("encoder.down.") for key in state)


def ldm_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of diffusers' `AutoencoderKL` for a checkpoint in LDM's names, read off its shapes.

    Raises:
        ValueError: tensors that such an autoencoder must have are missing; embed_dim other than z_channels.
    """
    levels = _levels(state, "encoder.down")
    needed = [f"{half}.{end}.weight" for half in ("encoder", "decoder") for end in ("conv_in", "conv_out")]
    needed += [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    needed += ["decoder.up.0.block.0.conv1.weight"]
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"this is no checkpoint of an LDM autoencoder: it has no {', '.join(missing[:8])}")
    z_channels = state["decoder.conv_in.weight"].shape[1]
    embed_dim = state["post_quant_conv.weight"].shape[1] if "post_quant_conv.weight" in state else z_channels
    if embed_dim != z_channels:
        raise ValueError(f"embed_dim {embed_dim} is not z_channels {z_channels}; diffusers has one number for both")
    blocks = 1 + max(int(found[1]) for key in state if (found := re.match(r"encoder\.down\.0\.block\.(\d+)\.", key)))
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    # The halves may differ: MAR's autoencoder has attention at the lowest level of its encoder only.
    down, up = (
        [any(key.startswith(f"{part}.{level}.attn.") for key in state) for level in range(levels)]
        for part in ("encoder.down", "decoder.up")
    )
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": z_channels,
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(up)],
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
    }


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` in diffusers' names and shapes: levels of the decoder count from the lowest, attention is linear."""
    levels = _levels(state, "decoder.up")
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda found: f"decoder.up.{levels - 1 - int(found[1])}.", key)
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        # LDM writes the projections of attention as 1 x 1 convolutions.
        flat = ".attentions." in name and value.ndim == 4
        renamed[name] = value.flatten(1) if flat else value
    return renamed


def _levels(state: Mapping[str, Tensor], part: str) -> int:
    return 1 + max((int(key.split(".")[2]) for key in state if re.match(rf"{part}\.\d+\.", key)), default=-1)
