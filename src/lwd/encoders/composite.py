"""Several encoders as one: images to composite latents, and to REPA features in the same pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lwd.latents import Group, LatentSpec

Posterior = Literal["sample", "mean"]
"""Whether latents are samples from an encoder's posterior or its means."""


class GroupEncoder(Protocol):
    """Images to the latents of one group."""

    def encode(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """uint8 [N, c, H, W] -> float [N, C, h, w]. `seeds`, one per image, is for encoders that draw a sample."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the encoder, for the manifest; as JSON."""
        ...


class FeatureNetwork(Protocol):
    """A pretrained network that gives features on a grid."""

    @property
    def width(self) -> int:
        """Features F per position."""
        ...

    def feature_maps(self, images: Tensor) -> Tensor:
        """uint8 [N, c, H, W] -> float32 [N, F, h, w]."""
        ...

    def describe(self) -> dict[str, Any]: ...


class Projection(Protocol):
    """Feature maps to few channels: a PCA, a SemVAE."""

    @property
    def channels(self) -> int: ...

    def transform(self, maps: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """[N, F, h, w] -> [N, C, h, w]."""
        ...

    def describe(self) -> dict[str, Any]: ...


class SharedFeatures:
    """A feature network that is run once per batch however many ask for its maps."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network = network
        self._last: tuple[Tensor, Tensor] | None = None

    def feature_maps(self, images: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not images:
            self._last = images, self.network.feature_maps(images)
        return self._last[1]


class ProjectedFeatures:
    """The semantic group of the paper: features of a network, projected to few channels."""

    def __init__(self, features: SharedFeatures, projection: Projection) -> None:
        self.features, self.projection = features, projection

    def encode(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        return self.projection.transform(self.features.feature_maps(images), seeds)

    def describe(self) -> dict[str, Any]:
        return {**self.projection.describe(), "network": self.features.network.describe()}


class CompositeEncoder:
    """Encoders of all groups, and the network whose features REPA aligns to.

    Args:
        groups: encoder of every group, in the order of the channels.
        weights: loss weight w_g of every group. By default they balance the groups' channels under the global mean
            (LWD Appendix B): the channels of the first group over those of the group.
        repa: its feature maps are stored too.
    """

    def __init__(
        self,
        groups: Mapping[str, GroupEncoder],
        *,
        weights: Mapping[str, float] | None = None,
        repa: SharedFeatures | None = None,
    ) -> None:
        if not groups:
            raise ValueError("there must be at least one group to encode")
        self.groups, self.weights, self.repa = dict(groups), dict(weights or {}), repa
        unknown = self.weights.keys() - self.groups.keys()
        if unknown:
            raise ValueError(f"weights for {sorted(unknown)}, but the groups are {', '.join(self.groups)}")

    @torch.no_grad()
    def encode(
        self, images: Tensor, seeds: Mapping[str, Sequence[int]] | None = None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Latents of every group [N, C_g, h, w], and REPA features [N, F, h', w'].

        Args:
            images: uint8 [N, c, H, W].
            seeds: by group, one per image.

        Raises:
            ValueError: two groups on different grids.
        """
        latents = {
            name: encoder.encode(images, None if seeds is None else seeds[name])
            for name, encoder in self.groups.items()
        }
        grids = {name: tuple(z.shape[2:]) for name, z in latents.items()}
        if len(set(grids.values())) > 1:
            listed = ", ".join(f"{name} {h} x {w}" for name, (h, w) in grids.items())
            raise ValueError(
                f"all groups must lie on one grid, but there are {listed}; choose the grid of the features, the patch "
                "of the pixels or the size of the images to fit"
            )
        return latents, None if self.repa is None else self.repa.feature_maps(images)

    def spec(self, channels: Mapping[str, int]) -> LatentSpec:
        """The groups, given how many channels each has."""
        first = next(iter(channels.values()))
        return LatentSpec([Group(name, c, self.weights.get(name, first / c)) for name, c in channels.items()])

    def describe(self) -> dict[str, Any]:
        described = {name: encoder.describe() for name, encoder in self.groups.items()}
        return described if self.repa is None else described | {"features": self.repa.network.describe()}
