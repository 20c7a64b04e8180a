"""Pixels as texture latents: patches rearranged into channels, an exact encoder with an exact decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class PixelPatches:
    """Every `patch` x `patch` square of pixels becomes one position with c * patch^2 channels in [-1, 1]."""

    def __init__(self, patch: int) -> None:
        if patch < 1:
            raise ValueError(f"a patch has at least one pixel, not {patch}")
        self.patch = patch

    def encode(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """uint8 [N, H, W] or [N, c, H, W] -> float32 [N, c patch^2, H / patch, W / patch]; nothing here is random."""
        if images.dtype != torch.uint8 or images.ndim not in (3, 4):
            raise ValueError(
                f"images must be uint8 [N, H, W] or [N, c, H, W], not {images.dtype} {tuple(images.shape)}"
            )
        images = images[:, None] if images.ndim == 3 else images
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"images of {height} x {width} cannot be cut into patches of {self.patch}")
        return F.pixel_unshuffle(images.float() / 127.5 - 1, self.patch)

    def decode(self, latents: Tensor) -> Tensor:
        """float [N, c patch^2, h, w] -> uint8 [N, c, h patch, w patch], rounded and clamped."""
        if latents.ndim != 4 or latents.shape[1] % self.patch**2:
            raise ValueError(
                f"latents {tuple(latents.shape)} do not hold patches of {self.patch} x {self.patch} pixels: there must "
                f"be a multiple of {self.patch**2} channels"
            )
        pixels = F.pixel_shuffle(latents.float(), self.patch)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def describe(self) -> dict[str, Any]:
        """The encoder's entry in a manifest."""
        return {"encoder": "pixels", "patch": self.patch}
