"""Feature maps for training on features: stored beside latents, or computed from images as they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lwd.data.dataset import LatentDataset
from lwd.data.images import ImageSource
from lwd.data.reading import Reading, read_batches
from lwd.encoders.composite import FeatureNetwork
from lwd.randomness import stream


class FeatureMaps(Protocol):
    """Feature maps [N, F, h, w] by number."""

    @property
    def width(self) -> int:
        """Features F per position."""
        ...

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> Tensor:
        """float32 [B, F, h, w]."""
        ...


class StoredFeatures:
    """The REPA features of a latent set; ValueError when it has none."""

    def __init__(self, directory: Path | str) -> None:
        self.data = LatentDataset.open(directory)
        if not self.data.features:
            raise ValueError(f"{directory} holds no features; encode the images with --repa, or give images instead")
        self.width: int = self.data.manifest["features"]["shape"][0]

    def __len__(self) -> int:
        return len(self.data)

    def gather(self, indices: Tensor) -> Tensor:
        features = self.data.gather(indices).features
        assert features is not None
        return features.float()


class ImageFeatures:
    """Features of images, computed when they are asked for: no disk, but the network runs every time."""

    def __init__(self, source: ImageSource, network: FeatureNetwork, reading: Reading) -> None:
        self.source, self.network, self.reading, self.width = source, network, reading, network.width

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, indices: Tensor) -> Tensor:
        batches = read_batches(self.source, self.reading.batches(indices.tolist()), self.reading)
        return torch.cat([self.network.feature_maps(batch.images) for batch in batches])


class _Part:
    """Some of the maps of another source."""

    def __init__(self, source: FeatureMaps, numbers: Tensor) -> None:
        self.source, self.numbers, self.width = source, numbers, source.width

    def __len__(self) -> int:
        return len(self.numbers)

    def gather(self, indices: Tensor) -> Tensor:
        return self.source.gather(self.numbers[indices])


def hold_out(source: FeatureMaps, heldout: int, seed: int) -> tuple[FeatureMaps, FeatureMaps]:
    """`source` without `heldout` maps drawn at random, and those; ValueError when nothing would be left."""
    if not 0 < heldout < len(source):
        raise ValueError(f"cannot hold out {heldout} of {len(source)} images")
    order = torch.randperm(len(source), generator=stream(seed, "held-out features"))
    return _Part(source, order[heldout:]), _Part(source, order[:heldout])
