"""Sizes of LightningDiT (Yao & Wang 2025; LWD Table 5, SFD)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lwd.latents import Group, LatentSpec


@dataclass(frozen=True)
class LightningDiTConfig:
    """Everything that fixes the architecture.

    Attributes:
        groups: the latent's groups; their channels in order are the network's channels.
        input_size: side of the square latent grid.
        num_classes: classes 0 ... num_classes - 1; one more embedding stands for "no label".
        patch_size: side of the square of latent positions that makes one token.
        mlp_ratio: hidden width of the plain MLP that the SwiGLU replaces at equal parameters, over the hidden size.
        clocks: time embedders: one per group (None), or 1 for a synchronous model, which reads the last group's time.
        qk_norm: RMSNorm on the queries and keys of every head; some LightningDiT checkpoints are without.
        repa_depth: block, counted from 1, whose output is projected for REPA; None for no projector.
        repa_dim: width of the features that REPA aligns to.
        repa_projector_dim: hidden width of the projector.

    Raises:
        ValueError: values that do not go together.
    """

    groups: tuple[Group, ...]
    input_size: int
    num_classes: int
    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int = 1
    mlp_ratio: float = 4.0
    clocks: int | None = None
    qk_norm: bool = True
    repa_depth: int | None = None
    repa_dim: int = 768
    repa_projector_dim: int = 2048

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", LatentSpec(self.groups).groups)
        if self.clocks is None:
            object.__setattr__(self, "clocks", len(self.groups))
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        if self.clocks not in (1, len(self.groups)):
            raise ValueError(f"clocks is {self.clocks}; use 1, or {len(self.groups)} for one per group")
        if self.input_size % self.patch_size:
            raise ValueError(f"a grid of {self.input_size} cannot be cut into patches of {self.patch_size}")
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over {self.num_heads} heads: the head width must be a whole multiple "
                "of 4, for the 2-D rotation"
            )
        if self.mlp_hidden < 1:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves the MLP without hidden units")
        if self.repa_depth is not None and not 1 <= self.repa_depth <= self.depth:
            raise ValueError(f"repa_depth {self.repa_depth} is not one of the {self.depth} blocks (counted from 1)")

    @property
    def spec(self) -> LatentSpec:
        return LatentSpec(self.groups)

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the SwiGLU: two thirds of the plain MLP's, which keeps the parameters equal."""
        return int(2 / 3 * int(self.hidden_size * self.mlp_ratio))

    @property
    def clock_widths(self) -> tuple[int, ...]:
        """Embedding width of every clock, in the order of the groups; together the hidden size."""
        assert self.clocks is not None
        share, rest = divmod(self.hidden_size, self.clocks)
        return (*[share] * (self.clocks - 1), share + rest)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self) | {"groups": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LightningDiTConfig:
        """The configuration that `to_dict` wrote; ValueError names fields that are missing or unknown."""
        check_fields(data)
        try:
            return cls(**data | {"groups": LatentSpec.from_dict(data["groups"]).groups})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a LightningDiT configuration: {error}") from error


_COUNTS = (
    *("input_size", "num_classes", "hidden_size", "depth", "num_heads", "patch_size", "clocks"),
    *("repa_dim", "repa_projector_dim"),
)

SIZES: dict[str, dict[str, int]] = {
    "demo": {"depth": 4, "hidden_size": 256, "num_heads": 4},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
    "1.0B": {"depth": 24, "hidden_size": 1536, "num_heads": 24},
}
"""The reference's sizes (1.0B is the paper's XXL), and one for demonstrations."""


def lightningdit_config(
    size: str, spec: LatentSpec | Sequence[Group], input_size: int, num_classes: int, **overrides: Any
) -> LightningDiTConfig:
    """A configuration by the name of its size.

    Args:
        size: a key of `SIZES`.
        spec: the latent's groups.
        overrides: any other field of `LightningDiTConfig`, for example ``repa_depth=2`` or ``patch_size=2``.

    Raises:
        ValueError: an unknown size or field (the nearest name is suggested), or values that do not go together.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}{did_you_mean(size, SIZES)}; there are {', '.join(SIZES)}")
    check_fields(overrides)
    groups = spec.groups if isinstance(spec, LatentSpec) else tuple(spec)
    settings: dict[str, Any] = SIZES[size] | overrides
    return LightningDiTConfig(groups=groups, input_size=input_size, num_classes=num_classes, **settings)


def check_fields(names: Iterable[str]) -> None:
    """ValueError, with the nearest name, unless all are fields of `LightningDiTConfig`."""
    known = [field.name for field in fields(LightningDiTConfig)]
    for name in names:
        if name not in known:
            raise ValueError(f"LightningDiTConfig has no field {name!r}{did_you_mean(name, known)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` with the nearest of the known names, whatever the case; empty when none is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
