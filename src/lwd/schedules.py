"""Schedules: one global time tau -> the local time of every group, and its derivative (LWD Eq. 8, 17-19, 40-42).

A schedule is called with tau [B] in [0, 1] and returns `LocalTimes(t, dt)`, both [B, G] in the order of the
groups. Local times run from 0 (noise) to 1 (data), never backwards, and reach both ends exactly in floating
point. The probe, the losses, the sampler and the report all share this one object; on disk it is a small JSON
file (`Schedule.save`, `load_schedule`).

At a kink the derivative is the one to the right (to the left at tau = 1).
"""

from __future__ import annotations

import copy
import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
        self.provenance: dict[str, Any] = {}

    @property
    def groups(self) -> int:
        return len(self.names)

    def forward(self, tau: Tensor) -> LocalTimes:
        """Local times at `tau` [B].

        Raises:
            ValueError: `tau` is not one-dimensional floating point, or (checked on the CPU only, where it costs
                no synchronisation) lies outside the domain.
        """
        if tau.ndim != 1 or not tau.is_floating_point():
            raise ValueError(f"tau must be a floating-point tensor [B], not {tau.dtype} of shape {tuple(tau.shape)}")
        if tau.device.type == "cpu" and not torch.compiler.is_compiling() and not ((tau >= 0) & (tau <= 1)).all():
            raise ValueError(f"global time lies in [0, 1]; got {tau.min().item():g} to {tau.max().item():g}")
        return self.local_times(tau)

    @abstractmethod
    def local_times(self, tau: Tensor) -> LocalTimes:
        """`forward` without its checks."""

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


class PolynomialSchedule(Schedule):
    """The learnable convex monotone family of Eq. 40-41.

    The last group is the global clock (Eq. 17); every other follows the next one through its own curve f, so a
    chain t_G = tau, t_g = f_g(t_{g+1}) keeps the order t_1 <= ... <= t_G (Eq. 42, 19) for any number of groups:

        f'(s) = 1/Z sum_m a_m s^m,   f(s) = 1/Z sum_m a_m/(m+1) s^(m+1),   a = softplus(rho),   Z = sum_m a_m/(m+1)

    Args:
        degree: M, the degree of f'. M = 4 in the paper.
        rho: initial parameters [G-1, M+1] (or [M+1] for two groups); by default close to the identity, with
            f(1/2) = 0.492 at M = 4.
    """

    kind = "polynomial"
    rho: Tensor

    def __init__(
        self,
        degree: int = 4,
        rho: Tensor | Sequence[Any] | None = None,
        groups: int = 2,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(groups, names)
        if groups < 2:
            raise ValueError("a learned schedule relates at least two groups; for one use SynchronousSchedule(1)")
        if degree < 1:
            raise ValueError(f"degree must be at least 1, not {degree} (degree 0 is the synchronous schedule)")
        self.degree = degree
        if rho is None:
            # softplus^-1(1) for the constant term and a_m = 0.018 for the others.
            rho = torch.tensor([math.log(math.e - 1)] + [-4.0] * degree).repeat(groups - 1, 1)
        values = torch.as_tensor(rho, dtype=torch.float32)
        if values.shape != (groups - 1, degree + 1) and (groups > 2 or values.shape != (degree + 1,)):
            raise ValueError(
                f"rho has shape {tuple(values.shape)}; {groups} groups and degree {degree} need "
                f"[{groups - 1}, {degree + 1}]"
            )
        if not values.isfinite().all():
            raise ValueError("rho contains NaN or infinity, so the curve is not monotone from 0 to 1")
        self.rho = nn.Parameter(values.detach().clone().reshape(groups - 1, degree + 1))

    def local_times(self, tau: Tensor) -> LocalTimes:
        # Far below any rho that learning reaches; it keeps Z from vanishing in float32.
        a = F.softplus(self.rho.to(tau.dtype).clamp(min=-80.0)).reshape(self.groups - 1, self.degree + 1)
        t, dt = [tau], [torch.ones_like(tau)]
        for a_g in a.flip(0):
            f, df = _normalised_polynomial(a_g, t[0])
            dt.insert(0, df * dt[0])
            t.insert(0, f)
        return LocalTimes(torch.stack(t, dim=1), torch.stack(dt, dim=1))

    def parameters_dict(self) -> dict[str, Any]:
        return {"degree": self.degree, "rho": self.rho.detach().cpu().tolist()}


def _normalised_polynomial(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """f(s) and f'(s) of Eq. 40-41 for coefficients a [M+1]."""
    integral = a / torch.arange(1, len(a) + 1, device=a.device, dtype=a.dtype)
    # Z is the same Horner sum at s = 1: the very same roundings, so f(1) = 1 exactly and f(s) <= s always.
    Z = _horner(integral, torch.ones_like(s))
    return s * (_horner(integral, s) / Z), _horner(a, s) / Z


def _horner(coefficients: Tensor, s: Tensor) -> Tensor:
    value = coefficients[-1].expand_as(s)
    for coefficient in coefficients[:-1].flip(0):
        value = value * s + coefficient
    return value


class PiecewiseLinearSchedule(Schedule):
    """Straight lines between knots: any measured or hand-drawn schedule, and the base of the fixed ones below.

    Args:
        tau: global times of the knots, [K], strictly increasing from 0 to 1.
        t: local times at the knots, [K, G], each column from 0 to 1 and never decreasing.

    Raises:
        ValueError: naming the knot and group at which the curve is not monotone or misses its ends.
    """

    kind = "piecewise_linear"

    def __init__(
        self,
        tau: Sequence[float],
        t: Sequence[Sequence[float]],
        groups: int | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._knots = torch.as_tensor(tau, dtype=torch.float64)
        self._values = torch.as_tensor(t, dtype=torch.float64)
        if self._values.ndim != 2 or self._knots.ndim != 1 or len(self._values) != len(self._knots):
            raise ValueError(
                f"knots tau of shape {tuple(self._knots.shape)} need local times t of shape [K, G], "
                f"not {tuple(self._values.shape)}"
            )
        super().__init__(self._values.shape[1], names)
        if groups not in (None, self.groups):
            raise ValueError(f"the curve has {self.groups} columns for {groups} groups")
        if len(self._knots) < 2 or self._knots[0] != 0 or self._knots[-1] != 1 or (self._knots.diff() <= 0).any():
            raise ValueError("knots tau must increase strictly from 0 to 1")
        self._check_monotone()
        slopes = self._values.diff(dim=0) / self._knots.diff()[:, None]
        self._slopes = slopes
        jumps = (slopes.diff(dim=0).abs() > 1e-9).any(dim=1)
        self.kinks = tuple(self._knots[1:-1][jumps].tolist())

    def _check_monotone(self) -> None:
        for group, name in enumerate(self.names):
            curve = self._values[:, group]
            if curve[0] != 0 or curve[-1] != 1 or not curve.isfinite().all():
                raise ValueError(f"the local time of {name!r} must run from 0 to 1, not {curve[0]:g} to {curve[-1]:g}")
            if (curve.diff() < 0).any():
                k = int((curve.diff() < 0).nonzero()[0, 0])
                raise ValueError(
                    f"the local time of {name!r} runs backwards: {curve[k]:g} at tau = {self._knots[k]:g}, then "
                    f"{curve[k + 1]:g} at tau = {self._knots[k + 1]:g}; a schedule must be monotone"
                )

    def local_times(self, tau: Tensor) -> LocalTimes:
        knots, values, slopes = (x.to(tau.device, tau.dtype) for x in (self._knots, self._values, self._slopes))
        piece = torch.bucketize(tau, knots[1:-1], right=True)
        left, right = knots[piece], knots[piece + 1]
        # lerp is exact at both ends, so t(0) = 0 and t(1) = 1 in every precision.
        # Two knots can round to one in float32: then the piece is its end.
        fraction = torch.where(right > left, (tau - left) / (right - left), 1.0)
        t = torch.lerp(values[piece], values[piece + 1], fraction[:, None])
        return LocalTimes(t, slopes[piece])

    def parameters_dict(self) -> dict[str, Any]:
        return {"tau": self._knots.tolist(), "t": self._values.tolist()}


class SynchronousSchedule(PiecewiseLinearSchedule):
    """All groups on one clock, t_g = tau: LightningDiT and ReDi."""

    kind = "synchronous"

    def __init__(self, groups: int = 2, names: Sequence[str] | None = None) -> None:
        super().__init__([0.0, 1.0], [[0.0] * groups, [1.0] * groups], names=names)

    def parameters_dict(self) -> dict[str, Any]:
        return {}


class OffsetSchedule(PiecewiseLinearSchedule):
    """Semantic-First Diffusion (arXiv 2512.04926): every group starts `delta` after the next one, in units of one
    group's own duration:

        t_sem = min(1, (1+delta) tau),   t_tex = max(0, (1+delta) tau - delta)

    A group that has not started or has finished rests (dt = 0). delta = 0.3 in SFD; 0 is synchronous, 1 a cascade.
    """

    kind = "offset"

    def __init__(self, delta: float = 0.3, groups: int = 2, names: Sequence[str] | None = None) -> None:
        if not (delta >= 0 and math.isfinite(delta)):
            raise ValueError(f"delta is a delay and cannot be {delta}")
        self.delta = delta
        total = 1 + (groups - 1) * delta
        delays = [(groups - 1 - g) * delta for g in range(groups)]
        knots = sorted({0.0, 1.0, *(d / total for d in delays), *((d + 1) / total for d in delays if d + 1 < total)})

        # 0 and 1 are set, not computed: total * tau - d need not round to them, and a resting group must not creep.
        def local(tau: float, d: float) -> float:
            if tau <= d / total:
                return 0.0
            return 1.0 if tau >= (d + 1) / total else min(1.0, max(0.0, total * tau - d))

        super().__init__(knots, [[local(tau, d) for d in delays] for tau in knots], names=names)

    def parameters_dict(self) -> dict[str, Any]:
        return {"delta": self.delta}


class CascadedSchedule(PiecewiseLinearSchedule):
    """One group after the other, each alone on the way (Latent Forcing, arXiv 2602.11401), the last group first."""

    kind = "cascaded"

    def __init__(self, groups: int = 2, names: Sequence[str] | None = None) -> None:
        knots = [k / groups for k in range(groups + 1)]
        done = [[1.0 if k >= groups - g else 0.0 for g in range(groups)] for k in range(groups + 1)]
        super().__init__(knots, done, names=names)

    def parameters_dict(self) -> dict[str, Any]:
        return {}


class ShiftedSchedule(Schedule):
    """Time-shifted clocks (Latent Forcing, arXiv 2602.11401): t_g = a_g tau / (1 + (a_g - 1) tau).

    Args:
        shifts: a_g > 0 for every group; above 1 a group leads the global clock, below 1 it follows.
    """

    kind = "shifted"

    def __init__(
        self, shifts: Sequence[float] = (1.0, 3.0), groups: int | None = None, names: Sequence[str] | None = None
    ) -> None:
        super().__init__(len(shifts), names)
        if groups not in (None, self.groups):
            raise ValueError(f"{self.groups} shifts for {groups} groups")
        if not all(a > 0 and math.isfinite(a) for a in shifts):
            raise ValueError(f"shifts must be positive and finite, not {tuple(shifts)}")
        self.shifts = tuple(float(a) for a in shifts)

    def local_times(self, tau: Tensor) -> LocalTimes:
        a, s = tau.new_tensor(self.shifts), tau[:, None]
        denominator = a * s + (1 - s)  # = 1 + (a - 1) tau, written so that t(1) = a / a
        return LocalTimes(a * s / denominator, a / denominator**2)

    def parameters_dict(self) -> dict[str, Any]:
        return {"shifts": list(self.shifts)}
