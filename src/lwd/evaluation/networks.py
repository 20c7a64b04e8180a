"""Feature networks by name, for the same scores of any images: Inception, DINOv2, CLIP, the embedded EfficientNet."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lwd.encoders.efficientnet import POOLED_BLOCK, EfficientNetFeatures
from lwd.encoders.efficientnet import SHA256 as EFFICIENTNET_SHA256
from lwd.encoders.foundation import (
    ALIASES,
    CLIP_COLOURS,
    DINOV2_IMAGE_SIZE,
    IMAGENET_COLOURS,
    load_network,
)
from lwd.evaluation.features import FeatureExtractor
from lwd.evaluation.inception import NAME as INCEPTION
from lwd.evaluation.inception import load_inception
from lwd.evaluation.numerics import float32_arithmetic

Precision = Literal["float32", "tf32"]

DINOV2_FILE = "dinov2_vitl14_pretrain.pth"
DINOV2_URL = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{DINOV2_FILE}"
_POSITION_OFFSET = 0.1


@dataclass(frozen=True)
class _Known:
    """A network with a short name: where it is, what its metrics are called, what its weights must be of."""

    source: str
    metric: str
    kind: str
    width: int


_KNOWN = {
    "dinov2": _Known("facebook/dinov2-large", "dinov2", "dinov2", 1024),
    "dinov2-s": _Known(ALIASES["dinov2-s"], "dinov2_s_reg", "dinov2_with_registers", 384),
    "dinov2-b": _Known(ALIASES["dinov2-b"], "dinov2_b_reg", "dinov2_with_registers", 768),
    "dinov2-l": _Known(ALIASES["dinov2-l"], "dinov2_l_reg", "dinov2_with_registers", 1024),
    "clip-b": _Known(ALIASES["clip-b"], "clip_b", "clip_vision_model", 768),
    "clip-l": _Known(ALIASES["clip-l"], "clip_l", "clip_vision_model", 1024),
}
NETWORKS = ("inception", "efficientnet", *_KNOWN)


def feature_extractor(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
) -> FeatureExtractor:
    """A network to score images with, see `score_images`.

    Args:
        name: one of

            - ``inception``: ADM's, for FID and the rest of its protocol (`load_inception`);
            - ``dinov2``: FD-DINOv2 as published (Stein et al. 2023; Karras et al. 2024), see `ClassToken`;
            - ``dinov2-s``, ``dinov2-b``, ``dinov2-l``: DINOv2 with registers, which the published one has not;
            - ``clip-b``, ``clip-l``: the vision tower of CLIP;
            - ``efficientnet``: the embedded network (extra `demo`), for small data of any size, grey or colour;
            - a directory as transformers saves a DINOv2 or CLIP, or the name of one on the Hugging Face hub.
        weights: where the weights of a network named above lie, if not in the caches of torch and of the hub: for
            Inception see `load_inception`; else a directory of transformers, or a file of DINOv2's authors
            (``dinov2_vitl14_pretrain.pth``).
        precision: "tf32" lets a GPU use TF32, several times faster; scores then say so.

    Returns:
        An extractor whose `name` ends its metrics: ``fd_dinov2``, ``fd_efficientnet``, ``fd_dinov2_b_reg`` ... That
        of one given by path has the beginning of its weights' hash in it, so that no two networks share a metric.

    Raises:
        FileNotFoundError: no weights; the message says where to get them.
        ImportError: the extra with the network is not installed.
        ValueError: an unknown name; weights that are damaged, or of another network than the name says.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r} is unknown; there are {', '.join(get_args(Precision))}")
    name, tf32 = str(name), precision == "tf32"
    if name in ("inception", INCEPTION):
        return load_inception(weights, device, tf32=tf32)
    if name == "efficientnet":
        if weights is not None:
            raise ValueError(f"efficientnet's weights come with its package, not from {weights}; leave weights out")
        return EmbeddedNetwork(EfficientNetFeatures.load(device), tf32=tf32)
    if name in _KNOWN:
        model, sha256 = _load_known(name, _KNOWN[name], weights, device)
        return ClassToken(_KNOWN[name].metric, model, sha256, tf32=tf32)
    if weights is not None:
        raise ValueError(f"{name} says where weights are, and so does weights={weights}; give one of the two")
    is_path = Path(name).expanduser().exists()
    if not is_path and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        near = difflib.get_close_matches(name, NETWORKS, 1)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(
            f"no network is called {name!r}{meant} There are {', '.join(NETWORKS)}; else give a directory that "
            "transformers saved, or a name on the Hugging Face hub (owner/name)"
        )
    model, sha256 = load_network(name, device)
    metric = re.sub(r"\W+", "_", f"{Path(name).expanduser().resolve().stem}_{sha256[:8]}" if is_path else name)
    return ClassToken(metric, model, sha256, tf32=tf32)


class ClassToken:
    """The class token of a DINOv2 or a CLIP after its final layer norm; a `FeatureExtractor`.

    What FD-DINOv2 is defined by: ViT-L/14 without registers, images of 224 x 224 (bicubic, antialiased), ImageNet's
    colours. Stein et al. (dgm-eval) resize with Pillow, which rounds to 8 bits and clips after each of two passes; so
    does this, on any device: 99 % of the pixels and more are Pillow's, the others a level or two off. Karras et al.
    (EDM2) resize in float32 and neither round nor clip, which they found to be almost the same. Images that are not
    square are squeezed, as by both.

    DINOv2's 37 x 37 position embeddings are brought to 16 x 16 as its authors do: bicubic with a scale factor of
    (16 + 0.1) / 37 for the networks without registers, where transformers gives the size instead and samples slightly
    elsewhere. For those with registers both agree, see `lwd.encoders.foundation`.

    Of CLIP it is the class token after the final layer norm too, before the projection into the space that is shared
    with text; images have the size of its training.

    Attributes:
        name: ends the names of metrics.
        sha256: of the weights' file.
        device: where images are sent, and features are left.
    """

    def __init__(self, name: str, model: Any, sha256: str, *, tf32: bool = False) -> None:
        config = model.config
        self.name, self.sha256, self.tf32, self.model = name, sha256, tf32, model.eval()
        self.device: torch.device = next(model.parameters()).device
        self._network: str = config.model_type
        is_clip = self._network.startswith("clip")
        self._size: int = config.image_size if is_clip else DINOV2_IMAGE_SIZE
        side, rest = divmod(self._size, config.patch_size)
        if rest:
            raise ValueError(f"{name} has patches of {config.patch_size} pixels, which do not divide {self._size}")
        colours = torch.tensor(CLIP_COLOURS if is_clip else IMAGENET_COLOURS, device=self.device)
        self._mean, self._std = colours[:, :, None, None]
        if self._network == "dinov2":
            # Of the size that is needed, transformers takes them as they are.
            embeddings = model.embeddings
            resized = authors_positions(embeddings.position_embeddings.detach(), side)
            embeddings.position_embeddings = torch.nn.Parameter(resized, requires_grad=False)

    @property
    def settings(self) -> dict[str, object]:
        """What else the features depend on."""
        return {
            "network": self._network,
            "features": "class token after the final layer norm",
            "resize": f"bicubic, antialiased, to {self._size}, 8 bits",
            "precision": "float32",
            "tf32": self.tf32,
        }

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Class tokens.

        Args:
            images: uint8 [N, 3, H, W], or grey [N, 1, H, W].

        Returns:
            pool: float32 [N, D], on the device of the network.

        Raises:
            ValueError: images of another dtype or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be uint8 [N, 3 or 1, H, W], not {images.dtype} {list(images.shape)}")
        with float32_arithmetic(self.device, tf32=self.tf32):
            x = self.resized(images.to(self.device, non_blocking=True).expand(-1, 3, -1, -1))
            return {"pool": self.model(pixel_values=(x / 255 - self._mean) / self._std).pooler_output}

    def resized(self, images: Tensor) -> Tensor:
        """Whole numbers 0 .. 255 as float32 [N, C, S, S]."""
        x = images.float()
        if x.shape[2:] == (self._size, self._size):
            return x
        # Along the rows first, halves up, as Pillow.
        for size in ((x.shape[2], self._size), (self._size, self._size)):
            x = F.interpolate(x, size, mode="bicubic", antialias=True).add_(0.5).floor_().clamp_(0, 255)
        return x


class EmbeddedNetwork:
    """EfficientNet-Lite0's last block averaged over positions (320 features of images at 64 px); a `FeatureExtractor`.

    What `evaluate_images` calls `fd_embedded`. It also makes the semantic latents of small data, and favours whoever
    generates those well.
    """

    name = "efficientnet"
    sha256 = EFFICIENTNET_SHA256

    def __init__(self, network: EfficientNetFeatures, *, tf32: bool = False) -> None:
        self.network, self.tf32 = network, tf32
        self.device: torch.device = network.get_buffer("stem_bias").device

    @property
    def settings(self) -> dict[str, object]:
        """What else the features depend on."""
        return {
            "features": f"block {POOLED_BLOCK}, averaged",
            "resize": f"bilinear, antialiased, to {self.network.size}",
            "precision": "float32",
            "tf32": self.tf32,
        }

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """pool: float32 [N, 320] of images uint8 [N, 3, H, W] or grey [N, 1, H, W]; ValueError for others."""
        with float32_arithmetic(self.device, tf32=self.tf32):
            return {"pool": self.network.pooled(images)}


def authors_positions(positions: Tensor, side: int) -> Tensor:
    """Position embeddings [1, 1 + side^2, D] from [1, 1 + M^2, D], as the authors of DINOv2 without registers resize.

    They add 0.1 to the wanted size and give the ratio in place of the size (`interpolate_offset` in their code): output
    i is taken at (i + 1/2) M / (side + 0.1) - 1/2.
    """
    stored = math.isqrt(positions.shape[1] - 1)
    if stored == side:
        return positions
    grid = positions[:, 1:].unflatten(1, (stored, stored)).permute(0, 3, 1, 2)
    ratio = (side + _POSITION_OFFSET) / stored
    grid = F.interpolate(grid, scale_factor=(ratio, ratio), mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _load_known(
    name: str, known: _Known, weights: str | Path | None, device: torch.device | str
) -> tuple[torch.nn.Module, str]:
    published = Path(torch.hub.get_dir()) / "checkpoints" / DINOV2_FILE
    if weights is None:
        weights = published if name == "dinov2" and published.is_file() else known.source
    try:
        model, sha256 = load_network(weights, device)
    except FileNotFoundError as error:
        on_hub = weights == known.source
        reason = "is not in the hub's cache and could not be downloaded" if on_hub else "holds none that can be read"
        page = f"https://huggingface.co/{known.source}"
        where = f"download config.json and model.safetensors from {page} and pass their directory as weights"
        if name == "dinov2":
            where += f"; or download {DINOV2_URL} and pass its path, or put it into {published.parent}"
        raise FileNotFoundError(f"no weights of {name}: {weights} {reason}; {where}") from error
    found: Any = model.config
    if (found.model_type, found.hidden_size) != (known.kind, known.width):
        raise ValueError(
            f"{weights} has weights of a {found.model_type} of width {found.hidden_size}; {name} is a {known.kind} of "
            f"width {known.width} ({known.source}). To score with those weights, give their path as the network's name"
        )
    return model, sha256
