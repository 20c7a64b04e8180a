"""Composite latents: which channels of a tensor belong to which representation (LWD Eq. 3).

A composite latent is one tensor [B, C, H, W] whose channels are the groups' channels in the order of the
groups; in the paper, texture then semantic. Everything that acts on "each group" acts on all channels at once
through one of two maps: `LatentSpec.expand` (one value per group -> one value per channel) and
`LatentSpec.group_mean` (one value per channel -> one mean per group).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwd.files import read_json
from lwd.hub import directory_of


@dataclass(frozen=True)
class Group:
    """One representation inside the composite latent.

    Args:
        name: what files and reports call it, for example ``"texture"``.
        channels: how many channels of the composite it occupies, at least 1.
        weight: the fixed loss weight w_g of Eq. 33, not negative.
    """

    name: str
    channels: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a group needs a name, for example Group('texture', channels=32)")
        if self.channels < 1:
            raise ValueError(f"group {self.name!r} has {self.channels} channels; it needs at least 1")
        if not self.weight >= 0:
            raise ValueError(f"group {self.name!r} has weight {self.weight}; a loss weight is 0 or more")


@dataclass(frozen=True)
class LatentSpec:
    """The ordered groups of a composite latent; their order is the channel order.

    Raises:
        ValueError: no groups, or two groups of one name.
    """

    groups: tuple[Group, ...]

    def __init__(self, groups: Sequence[Group]) -> None:
        object.__setattr__(self, "groups", tuple(groups))
        if not self.groups:
            raise ValueError("a LatentSpec needs at least one Group")
        repeated = {name for name in self.names if self.names.count(name) > 1}
        if repeated:
            raise ValueError(f"group names must differ; repeated: {sorted(repeated)}")

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(group.name for group in self.groups)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Channels of every group, in order."""
        return tuple(group.channels for group in self.groups)

    @cached_property
    def channels(self) -> int:
        """Channels C of the composite."""
        return sum(self.sizes)

    def index(self, name: str) -> int:
        """Position of the group called `name`; ValueError when there is none."""
        if name not in self.names:
            raise ValueError(f"no group {name!r}; this latent has {', '.join(self.names)}")
        return self.names.index(name)

    def check(self, z: Tensor, what: str = "latents") -> None:
        """Raise ValueError unless `z` is [B, C, H, W] with this spec's C."""
        if z.ndim != 4 or z.shape[1] != self.channels:
            layout = " + ".join(f"{group.channels} {group.name}" for group in self.groups)
            raise ValueError(
                f"{what} have shape {tuple(z.shape)}, but the latent spec asks for [B, {self.channels}, H, W] "
                f"({layout} channels)"
            )

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        """The groups of `z` [B, C, ...] as views, in order."""
        return z.split(self.sizes, dim=1)

    def expand(self, per_group: Tensor) -> Tensor:
        """[B, G] -> [B, C, 1, 1]: every channel gets the value of its group."""
        # Not by index: on a GPU the gradient of that is summed in an order that changes from run to run.
        parts = [value.expand(-1, size) for value, size in zip(per_group.split(1, dim=1), self.sizes, strict=True)]
        return torch.cat(parts, dim=1)[:, :, None, None]

    def group_mean(self, values: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, G]: the mean over each group's channels and positions (||.||_g^2 of Eq. 22)."""
        # Multiply and sum: a matrix product would run in bfloat16 under autocast, and in TF32 where that is on.
        per_channel = values.flatten(2).mean(dim=2)
        return (per_channel[:, :, None] * _membership(self, values.device, values.dtype)).sum(dim=1)

    def weights(self, like: Tensor) -> Tensor:
        """The loss weights w_g, [G], on the device and in the dtype of `like`."""
        return _row(tuple(group.weight for group in self.groups), like.device, like.dtype)

    def shares(self, like: Tensor) -> Tensor:
        """Each group's share d_g / sum d of the composite's dimensions, [G]."""
        return _row(tuple(size / self.channels for size in self.sizes), like.device, like.dtype)

    def to_dict(self) -> list[dict[str, Any]]:
        return [{"name": g.name, "channels": g.channels, "weight": g.weight} for g in self.groups]

    @classmethod
    def from_dict(cls, groups: Sequence[dict[str, Any]]) -> LatentSpec:
        return cls([Group(**group) for group in groups])


# The caches outlive the mode they were filled in, so never with inference tensors, which autograd refuses.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _membership(spec: LatentSpec, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[C, G]: 1 / d_g where channel c belongs to group g, else 0."""
    owner = torch.repeat_interleave(torch.arange(len(spec)), torch.tensor(spec.sizes))
    one_hot = torch.nn.functional.one_hot(owner, len(spec))
    return (one_hot / one_hot.sum(dim=0)).to(device, dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _row(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _columns(normalization: Normalization, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation as [C, 1, 1]: on the device already, so that a step does not wait for a copy."""
    mean, std = torch.tensor([normalization.mean, normalization.std], dtype=dtype, device=device)
    return mean[:, None, None], std[:, None, None]


IMAGENET_SPEC = LatentSpec([Group("texture", 32, 1.0), Group("semantic", 16, 2.0)])
"""ImageNet 256 as in the paper: texture 32x16x16, semantic 16x16x16 with w_sem = 2 (Appendix B)."""


def resolve_spec(spec: LatentSpec | None, denoiser: object, channels: int, groups: int) -> LatentSpec:
    """The spec to use when a caller left it out: the denoiser's own, or the only one that fits.

    Args:
        spec: what the caller passed; wins over everything.
        denoiser: its attribute ``spec`` is used when it has one.
        channels, groups: of the tensor and of the schedule.

    Raises:
        ValueError: the spec contradicts the tensor or the schedule, or none can be inferred.
    """
    found = spec if spec is not None else getattr(denoiser, "spec", None)
    if found is None:
        if groups == 1:
            found = LatentSpec([Group("latent", channels)])
        elif channels == groups:
            found = LatentSpec([Group(f"group{i}", 1) for i in range(groups)])
        elif (channels, groups) == (IMAGENET_SPEC.channels, len(IMAGENET_SPEC)):
            found = IMAGENET_SPEC
        else:
            raise ValueError(
                f"cannot tell how {channels} channels divide into {groups} groups: pass spec=LatentSpec([...]), "
                "or give the denoiser an attribute `spec`"
            )
    if found.channels != channels:
        raise ValueError(f"the latent spec has {found.channels} channels, the tensor {channels}")
    if len(found) != groups:
        raise ValueError(f"the latent spec has {len(found)} groups {found.names}, the schedule {groups}")
    return found


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation of the training latents.

    Latents are normalised before the flow and un-normalised before decoding. The statistics travel with shards,
    checkpoints and samples; `require_equal` compares them on use.

    Attributes:
        mean, std: a number per channel, [C].

    Raises:
        ValueError: other numbers of means than of deviations; a deviation that is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means but {len(self.std)} standard deviations")
        if not all(s > 0 for s in self.std):
            bad = [i for i, s in enumerate(self.std) if not s > 0]
            raise ValueError(f"standard deviation must be positive; it is not for channels {bad[:8]}")

    @classmethod
    def from_latents(cls, latents: Tensor) -> Normalization:
        """Statistics over batch and positions of [N, C, H, W], accumulated in float64."""
        flat = latents.double().transpose(0, 1).flatten(1)
        return cls(tuple(flat.mean(dim=1).tolist()), tuple(flat.std(dim=1).tolist()))

    def normalize(self, latents: Tensor) -> Tensor:
        mean, std = self._columns(latents)
        return (latents - mean) / std

    def normalize_(self, latents: Tensor) -> Tensor:
        """`normalize` in the memory of `latents`."""
        mean, std = self._columns(latents)
        return latents.sub_(mean).div_(std)

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self._columns(latents)
        return latents * std + mean

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.shape[1] != len(self.mean):
            raise ValueError(f"statistics of {len(self.mean)} channels do not fit latents {tuple(like.shape)}")
        return _columns(self, like.device, like.dtype)

    def require_equal(self, other: Normalization, ours: str, theirs: str) -> None:
        """ValueError naming both sides unless the statistics agree to 1e-5 relative."""
        a = torch.tensor([self.mean, self.std], dtype=torch.float64)
        b = torch.tensor([other.mean, other.std], dtype=torch.float64)
        if a.shape != b.shape:
            raise ValueError(f"{ours} has statistics of {a.shape[1]} channels, {theirs} of {b.shape[1]}")
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-6):
            worst = int((a - b).abs().amax(dim=0).argmax())
            raise ValueError(
                f"normalisation statistics differ: channel {worst} has mean {self.mean[worst]:.6g} and std "
                f"{self.std[worst]:.6g} in {ours}, but {other.mean[worst]:.6g} and {other.std[worst]:.6g} in "
                f"{theirs}; they were made from different latents. Use the latents the checkpoint was trained on."
            )

    def to_dict(self) -> dict[str, list[float]]:
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, data: dict[str, Sequence[float]]) -> Normalization:
        return cls(tuple(data["mean"]), tuple(data["std"]))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Normalization:
        """The statistics kept with a latent set, a run or a saved pipeline: a directory, or a name on the hub.

        Raises:
            FileNotFoundError: no such directory, or none that keeps statistics.
        """
        directory = directory_of(source, ["latents.json", "manifest.json"], "directory with statistics of latents")
        for name in ("latents.json", "manifest.json"):
            if (directory / name).is_file():
                return cls.from_dict(read_json(directory / name)["normalization"])
        raise FileNotFoundError(f"{directory} keeps no statistics of latents: neither latents.json nor manifest.json")
