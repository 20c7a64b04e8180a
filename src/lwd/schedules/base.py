"""What every schedule is, and how it is written and read; see the package's docstring."""

from __future__ import annotations

import copy
import difflib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from lwd.files import read_json, write_json

FORMAT = "lwd-schedule/1"
KINDS: dict[str, type[Schedule]] = {}


class LocalTimes(NamedTuple):
    """Local times and their derivatives in global time, both [B, G]."""

    t: Tensor
    dt: Tensor


class Schedule(nn.Module, ABC):
    """Maps global time to the local time of every group.

    Attributes:
        names: the groups' names, in order.
        kinks: interior times where a derivative jumps; a solver integrates the pieces between them separately.
        domain: the global times the schedule is defined on.
        provenance: how the schedule came about (for a learned one, its probe); kept in the file.
    """

    kind: ClassVar[str]
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)
    kinks: tuple[float, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls

    def __init__(self, groups: int, names: Sequence[str] | None = None) -> None:
        super().__init__()
        if groups < 1:
            raise ValueError(f"a schedule needs at least one group, not {groups}")
        if names is None:
            names = ("texture", "semantic") if groups == 2 else [f"group{i}" for i in range(groups)]
        if len(names) != groups:
            raise ValueError(f"{len(names)} group names {tuple(names)} for a schedule of {groups} groups")
        if len(set(names)) != groups:
            raise ValueError(f"group names must differ, not {tuple(names)}")
        self.names = tuple(names)
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}
        self.provenance: dict[str, Any] = {}

    @property
    def groups(self) -> int:
        return len(self.names)

    @property
    def clocks(self) -> int:
        """Global times that a sample has: 1, but for `IndependentTimes`."""
        return 1

    def path(self) -> Schedule:
        """What to sample along where nothing else is said: the schedule itself."""
        return self

    def forward(self, tau: Tensor) -> LocalTimes:
        """Local times at `tau` [B].

        Raises:
            ValueError: `tau` is not one-dimensional floating point, or (checked on the CPU only, where it costs
                no synchronisation) lies outside the domain.
        """
        clocks = () if self.clocks == 1 or tau.ndim == 1 else (self.clocks,)
        if tau.ndim == 0 or tau.shape[1:] != clocks or not tau.is_floating_point():
            wanted = f"[B{', ' * bool(clocks)}{', '.join(map(str, clocks))}]"
            raise ValueError(f"tau must be a floating-point tensor {wanted}, not {tau.dtype} {list(tau.shape)}")
        if tau.device.type == "cpu" and not torch.compiler.is_compiling() and not ((tau >= 0) & (tau <= 1)).all():
            raise ValueError(f"global time lies in [0, 1]; got {tau.min().item():g} to {tau.max().item():g}")
        return self.local_times(tau)

    @abstractmethod
    def local_times(self, tau: Tensor) -> LocalTimes:
        """`forward` without its checks."""

    def _constants(self, tau: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """The schedule's own `values`, always the same ones, on the device and in the dtype of `tau`.

        They are kept there: a copy from the host would make every step of a training or a solver wait for the GPU.
        """
        key = tau.device, tau.dtype
        if key not in self._placed:
            with torch.inference_mode(False):  # what is kept must be fit for a later backward pass
                self._placed[key] = tuple(value.to(*key) for value in values)
        return self._placed[key]

    @torch.no_grad()
    def inverse(self, t: Tensor, group: int) -> Tensor:
        """The global time at which `group` reaches local time `t` [B], by bisection to float64 precision.

        Where a group rests, the answer is the moment it starts (t = 0) or arrives (t = 1).
        """
        target = t.double()
        if not ((target >= 0) & (target <= 1)).all():
            raise ValueError(f"local time lies in [0, 1]; got {t.min().item():g} to {t.max().item():g}")
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(64):
            middle = (low + high) / 2
            reached = self.local_times(middle).t[:, group]
            before = torch.where(target <= 0, reached <= target, reached < target)
            low, high = torch.where(before, middle, low), torch.where(before, high, middle)
        return torch.where(target <= 0, low, high).to(t.dtype)

    def frozen(self) -> Self:
        """A copy whose parameters no longer learn."""
        return copy.deepcopy(self).requires_grad_(False).eval()

    @abstractmethod
    def parameters_dict(self) -> dict[str, Any]:
        """The JSON-ready arguments that `from_parameters` rebuilds this schedule from."""

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any], names: Sequence[str]) -> Self:
        return cls(**parameters, groups=len(names), names=names)  # type: ignore[call-arg]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "groups": list(self.names),
            "parameters": self.parameters_dict(),
            "provenance": self.provenance,
        }

    def save(self, path: str | Path) -> Path:
        """Write the schedule as readable JSON, atomically; `load_schedule` reads it back bit for bit."""
        return write_json(path, self.to_dict())


def schedule_from_dict(data: dict[str, Any], where: str = "schedule") -> Schedule:
    """The schedule that `Schedule.to_dict` described; `where` names the source in errors."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{where}: not a schedule file ('format' should be {FORMAT!r}, found {found!r})")
    missing = {"kind", "groups", "parameters"} - data.keys()
    if missing:
        raise ValueError(f"{where}: the entries {sorted(missing)} are missing")
    if not isinstance(data["kind"], str) or data["kind"] not in KINDS:
        near = difflib.get_close_matches(str(data["kind"]), KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{where}: unknown kind {data['kind']!r}{hint} Known kinds: {', '.join(sorted(KINDS))}")
    try:
        schedule = KINDS[data["kind"]].from_parameters(data["parameters"], data["groups"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    absent = schedule.parameters_dict().keys() - data["parameters"].keys()
    if absent:  # the constructor's defaults are no substitute for a curve that somebody saved
        raise ValueError(f"{where}: the parameters {sorted(absent)} of the {data['kind']} schedule are missing")
    schedule.provenance = data.get("provenance", {})
    return schedule


def load_schedule(path: str | Path, groups: Sequence[str] | None = None) -> Schedule:
    """Read a schedule file.

    Args:
        path: a file written by `Schedule.save`; a directory with a ``schedule.json``, such as a run's; or the name of
            a repository on the Hugging Face hub that has one.
        groups: the group names the caller works with; checked against the file when given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated or not a schedule, unknown kind, a curve that is not monotone from 0 to 1, or other
            groups than asked for.
    """
    file = Path(path)
    if not file.is_file():
        from lwd.hub import directory_of

        file = directory_of(path, ["schedule.json"], "schedule file") / "schedule.json"
    schedule = schedule_from_dict(read_json(file), str(file))
    if groups is not None and tuple(groups) != schedule.names:
        raise ValueError(
            f"{path} schedules {schedule.groups} groups {schedule.names}, but the latents have "
            f"{len(groups)} groups {tuple(groups)}"
        )
    return schedule
