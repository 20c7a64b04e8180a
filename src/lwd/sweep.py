"""The sweep over lambda: which strength of the kinetic term lets the schedule settle (LWD Figure 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lwd.batches import LatentSource
from lwd.files import read_json, write_json
from lwd.metrics import Watcher
from lwd.probe import COLLAPSE_DELAY, LearnedSchedule, ProbeConfig, learn_schedule
from lwd.schedules import PolynomialSchedule, schedule_from_dict

CRITERION = (
    "The delay of a curve is the area between it and the identity, as a share of that area for the extreme member "
    "of the family, tau^(M+1): 0 for synchronous, 1 for the extreme. A probe has collapsed when the delay of its "
    f"averaged curve is at least {COLLAPSE_DELAY}. The picked lambda is the weakest of those at and above which no "
    "probe of the sweep collapsed. The area is used, not a single point, because every part of the curve counts in "
    "the losses; the bound stands in the gap between curves that run off to the extreme and curves that settle."
)


@dataclass(frozen=True)
class Sweep:
    """Probes over several lambda, weakest first, and the picked one (None when all collapsed)."""

    kinetics: tuple[float, ...]
    probes: tuple[LearnedSchedule, ...]
    picked: float | None

    @property
    def schedule(self) -> PolynomialSchedule:
        """The schedule of the picked lambda; ValueError when no value was stable."""
        if self.picked is None:
            raise ValueError(
                f"every probe collapsed to the extreme schedule, up to lambda = {max(self.kinetics):g}; "
                "sweep larger values"
            )
        return self.probes[self.kinetics.index(self.picked)].schedule

    def to_dict(self) -> dict[str, Any]:
        return {
            "criterion": CRITERION,
            "picked": self.picked,
            "runs": [
                {
                    "kinetic": kinetic,
                    "collapsed": probe.collapsed,
                    "delay": probe.delay,
                    "schedule": probe.schedule.to_dict(),
                    "history": probe.history,
                }
                for kinetic, probe in zip(self.kinetics, self.probes, strict=True)
            ],
        }

    def save(self, path: Path | str) -> Path:
        return write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> Sweep:
        data = read_json(path)
        probes = []
        for run in data["runs"]:
            schedule = schedule_from_dict(run["schedule"], str(path))
            assert isinstance(schedule, PolynomialSchedule)
            probes.append(LearnedSchedule(schedule.frozen(), run["history"], run["delay"]))
        return cls(tuple(run["kinetic"] for run in data["runs"]), tuple(probes), data["picked"])


def sweep_kinetic(
    make_denoiser: Callable[[], nn.Module],
    data: LatentSource,
    config: ProbeConfig,
    kinetics: Sequence[float],
    *,
    directory: Path | str | None = None,
    device: torch.device | str = "cpu",
    watch: Callable[[Path], Sequence[Watcher]] = lambda _: (),
) -> Sweep:
    """One probe per lambda, each from the same initial denoiser and on the same batches; picks the weakest stable one.

    Args:
        make_denoiser: builds the initial denoiser; must give the same weights at every call, so that lambda is the
            only thing that differs.
        kinetics: the values of lambda, in any order.
        directory: each probe gets a folder ``lambda-<value>`` in it; finished and interrupted ones are continued.
        watch: who gets the log lines of the probe in a folder.

    Raises:
        ValueError: no lambda, or a negative one; what `learn_schedule` raises.
    """
    kinetics = tuple(sorted(set(kinetics)))
    if not kinetics or kinetics[0] < 0:
        raise ValueError(f"a sweep needs values of lambda of at least 0, not {list(kinetics)}")
    probes = []
    for kinetic in kinetics:
        folder = None if directory is None else Path(directory) / f"lambda-{kinetic:g}"
        watchers = [] if folder is None else list(watch(folder))
        chosen = replace(config, kinetic=kinetic)
        title = f"probe lambda {kinetic:g}"
        probes.append(
            learn_schedule(
                make_denoiser(), data, chosen, directory=folder, device=device, title=title, watchers=watchers
            )
        )
        for watcher in watchers:
            watcher.close()
    return Sweep(kinetics, tuple(probes), weakest_stable(kinetics, [probe.collapsed for probe in probes]))


def bisect_kinetic(probe: Callable[[float], LearnedSchedule], low: float, high: float, *, rounds: int = 4) -> Sweep:
    """Narrow down the least lambda whose probe does not collapse, by halving the interval (in ratio, if `low` > 0).

    Args:
        probe: the probe of one lambda, for example a call of `sweep_kinetic` with one value.
        low, high: the interval; `low` is expected to collapse. If it does not, it is picked.
        rounds: probes inside the interval; its width shrinks by half with each.

    Returns:
        All probes made, and the weakest stable value among them; none when `high` collapsed too.

    Raises:
        ValueError: an interval that does not ascend from at least 0.
    """
    if not 0 <= low < high:
        raise ValueError(f"an interval of lambda must ascend from at least 0, not from {low:g} to {high:g}")
    found = {high: probe(high), low: probe(low)}
    if not found[high].collapsed and found[low].collapsed:
        for _ in range(rounds):
            middle = (low * high) ** 0.5 if low > 0 else high / 2
            middle = float(f"{middle:.3g}")
            if middle in found:
                break
            found[middle] = probe(middle)
            low, high = (middle, high) if found[middle].collapsed else (low, middle)
    kinetics = tuple(sorted(found))
    probes = tuple(found[kinetic] for kinetic in kinetics)
    return Sweep(kinetics, probes, weakest_stable(kinetics, [p.collapsed for p in probes]))


def weakest_stable(kinetics: Sequence[float], collapsed: Sequence[bool]) -> float | None:
    """The smallest lambda at and above which nothing collapsed; None when the largest did."""
    picked = None
    for kinetic, bad in sorted(zip(kinetics, collapsed, strict=True), reverse=True):
        if bad:
            break
        picked = kinetic
    return picked
