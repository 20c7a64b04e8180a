"""The public code of Semantic-First Diffusion (yuemingPAN/SFD), imported from a path, for benchmarks beside it.

Nothing of it is in this repository. It needs einops, scipy and torchdiffeq, and of timm only two layers, for which the
ones below stand in where timm is not installed.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "XL": (1152, 28, 16)}
MODEL_OPTIONS: dict[str, Any] = {
    "input_size": 16, "patch_size": 1, "in_channels": 48, "num_classes": 1000, "class_dropout_prob": 0.1,
    "use_qknorm": True, "use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "semantic_chans": 16,
    "semfirst_delta_t": 0.3, "repa_dino_version": "dinov2_vitb14_reg", "repa_depth": 2,
}  # fmt: skip
"""As in its configurations for 256 x 256 images."""


class PatchEmbed(nn.Module):
    """Stands in for timm's: a strided convolution, tokens last but one."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size, self.num_patches = (patch_size, patch_size), (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def import_sfd(path: Path) -> None:
    """Make ``models`` and ``transport`` of a checkout at `path` importable."""
    if not (path / "models" / "lightningdit.py").is_file():
        raise SystemExit(f"{path} is no checkout of yuemingPAN/SFD: it has no models/lightningdit.py")
    try:
        import timm.models.vision_transformer  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("timm.models.vision_transformer")
        stand_in.PatchEmbed, stand_in.Mlp = PatchEmbed, nn.Identity  # type: ignore[attr-defined]
        sys.modules |= {
            "timm": types.ModuleType("timm"),
            "timm.models": types.ModuleType("timm.models"),
            "timm.models.vision_transformer": stand_in,
        }
    sys.path.insert(0, str(path))


def sfd_network(size: str, *, repa: bool) -> nn.Module:
    """Its LightningDiT with weights that are zero nowhere, in training mode."""
    from models.lightningdit import LightningDiT as Theirs  # type: ignore[import-not-found]

    width, depth, heads = SIZES[size]
    model = Theirs(hidden_size=width, depth=depth, num_heads=heads, use_repa=repa, **MODEL_OPTIONS)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        assert parameter.any() or "pos_embed" in name
    return model.train()


def sfd_transport() -> Any:
    """Its loss: offset 0.3, semantic weight 2, cosine and REPA terms."""
    from transport import create_transport  # type: ignore[import-not-found]

    return create_transport(
        "Linear", "velocity", None, None, None, use_cosine_loss=True, use_lognorm=True, semantic_weight=2.0,
        semantic_chans=16, semfirst_delta_t=0.3, repa_weight=1.0,
    )  # fmt: skip
