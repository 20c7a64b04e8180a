"""Networks whose features are compared, by name: Inception for FID, DINOv2 for FD-DINOv2, others for other data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lwd.encoders.foundation import ALIASES, FoundationFeatures
from lwd.evaluation.features import FeatureExtractor, FunctionExtractor
from lwd.evaluation.inception import load_inception

FD_DINOV2 = "facebook/dinov2-large"
"""The network of FD-DINOv2: ViT-L/14 without registers."""
_OFFSET = 0.1
"""What DINOv2's authors add to the size that position embeddings are resized to, for networks without registers."""


def feature_extractor(
    name: str, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The network called `name`.

    Args:
        name: ``inception``: ADM's, for FID and sFID. ``dinov2``: `ClassTokens` of DINOv2 ViT-L/14, for FD-DINOv2.
            ``efficientnet``: the embedded network's pooled features, for small images. ``dinov2-s``, ``dinov2-b``,
            ``dinov2-l`` (with registers), ``clip-b``, ``clip-l``, or a directory or hub name of such a network for
            transformers: its class tokens.
        weights: file or directory of the weights, if not where torch or the hub keep their downloads.

    Raises:
        FileNotFoundError: no weights; says where to get them.
        ValueError: other weights than the published ones, or of an unsupported network.
        ImportError: a package is missing; says which.
    """
    if name == "inception":
        return load_inception(weights, device)
    if name == "efficientnet":
        from lwd.encoders.efficientnet import SHA256, EfficientNetFeatures

        network = EfficientNetFeatures.load(device)
        settings: dict[str, object] = {"features": "last block, pooled", "size": network.size}
        return FunctionExtractor("efficientnet", SHA256, network.pooled, settings)
    source = weights or {"dinov2": FD_DINOV2, **ALIASES}.get(name, name)
    short = name if name == "dinov2" or name in ALIASES else Path(name).name.replace("-", "_")
    return ClassTokens(FoundationFeatures.load(source, device=device), short)


class ClassTokens:
    """Class tokens of DINOv2 after its final norm, or of CLIP's vision tower after its own.

    With `FD_DINOV2` the Frechet distance of these is FD-DINOv2 (Stein et al. 2023). Images are prepared as in EDM2
    (Karras et al. 2024): resized to 224 pixels, bicubic and antialiased, in floating point (Stein et al. do the same
    with Pillow, which rounds to 8 bits). For DINOv2 without registers the position embeddings are resized as its
    authors do it, with an offset that transformers leaves out.

    Args:
        network: of `FoundationFeatures.load`.
        name: for the names of metrics, ``fd_<name>``.
    """

    def __init__(self, network: FoundationFeatures, name: str) -> None:
        self.name, self.sha256, self._network = name, network.sha256, network
        self.settings: dict[str, object] = {
            "network": network.network, "source": network.source, "features": "class token",
            "image_size": network.image_size, "resize": "bicubic, antialiased", "precision": network.precision,
        }  # fmt: skip
        if network.network == "dinov2":
            embeddings: Any = network.model.embeddings
            embeddings.interpolate_pos_encoding = lambda tokens, height, width: resized_positions(
                embeddings.position_embeddings, height // embeddings.patch_size, width // embeddings.patch_size
            )

    @torch.no_grad()
    def features(self, images: Tensor) -> Mapping[str, Tensor]:
        """ "pool" [N, D] of uint8 images [N, 1 or 3, S, S], any S."""
        network: Any = self._network
        size = network.image_size
        x = images.to(network.device).float().expand(-1, 3, -1, -1)
        if x.shape[2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
        x = (x / 255 - network._mean) / network._std
        found = network.model(pixel_values=x, **network._options)
        return {"pool": found.pooler_output.float()}


def resized_positions(embeddings: Tensor, rows: int, columns: int) -> Tensor:
    """DINOv2's position embeddings [1, 1 + M M, D] for rows x columns patches, by its authors' scale factors."""
    own, patches = embeddings[:, :1].float(), embeddings[:, 1:].float()
    side = round(patches.shape[1] ** 0.5)
    if (rows, columns) == (side, side):
        return embeddings
    grid = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factors = ((rows + _OFFSET) / side, (columns + _OFFSET) / side)
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    return torch.cat([own, grid.flatten(2).transpose(1, 2)], dim=1).to(embeddings.dtype)
