"""The figures of docs/results/evidence.md."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from experiments.collect import Evidence, Row, spread
from experiments.plans import AUTO_SCALES, FREE_SCALES, LEARNED
from experiments.sets import ENCODERS
from lwd.files import write_atomically
from lwd.latents import LatentSpec
from lwd.paths import best_path
from lwd.probe import COLLAPSE_DELAY
from lwd.recipes import make_schedule
from lwd.report.figures import INK, MUTED, PAPER, STYLE
from lwd.report.style import ink
from lwd.report.surfaces import paint_surface
from lwd.schedules import Schedule, schedule_from_dict
from lwd.surface import ErrorSurface, Weights

ENCODER_COLOURS = dict(zip(ENCODERS, (ink("synchronous"), ink("learned"), ink("autoguidance")), strict=True))
ARMS: dict[tuple[str, str], tuple[str, str, str]] = {
    (f"learned:{LEARNED:g}", ""): ("learned", ink("learned"), "o"),
    ("independent", ""): ("independent times", ink("autoguidance"), "D"),
    ("offset:0.15", "uncorrected"): ("offset 0.15", "#f4b183", "s"),
    ("offset:0.3", "uncorrected"): ("offset 0.3 (SFD)", ink("offset"), "s"),
    ("offset:0.6", "uncorrected"): ("offset 0.6", "#8c3d00", "s"),
    ("synchronous", ""): ("synchronous", ink("synchronous"), "^"),
    ("shifted:1,3", ""): ("shifted 1, 3", "#c9a400", "P"),
    ("cascaded", ""): ("cascaded", ink("weak"), "v"),
}
"""Title, colour and marker of the arms that are compared."""
GUIDANCES: dict[tuple[float, ...], str] = {(): "without guidance", (1.5,): "AutoGuidance 1.5"}


def draw(evidence: Evidence, folder: Path) -> list[Path]:
    """All figures there are results for; returns their paths."""
    import matplotlib

    made = []
    with matplotlib.rc_context(STYLE):
        for figure in (lambdas, probes, convergence, arms, quality, scales, oracle, surfaces):
            drawn = figure(evidence)
            if drawn is not None:
                path = folder / f"{figure.__name__}.png"
                write_atomically(path, partial(drawn.savefig, format="png", dpi=110))
                made.append(path)
    return made


def _figure(rows: int, columns: int, height: float = 4.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 5.4 * columns), height * rows), layout="constrained", facecolor=PAPER)
    return figure, figure.subplots(rows, columns, squeeze=False)


def lambdas(evidence: Evidence) -> Any:
    """Above, delay against lambda for the three encoders; below, the curves of the middle one."""
    names = [name for name in evidence.sets() if evidence.some_probes(data=name, variant="paper")]
    if not names:
        return None
    figure, axes = _figure(2, len(names))
    for column, name in enumerate(names):
        top, below = axes[:, column]
        top.set_title(name, loc="left", color=INK)
        for encoder, colour in ENCODER_COLOURS.items():
            rows = evidence.some_probes(data=name, encoder=encoder, variant="paper")
            if rows:
                found = spread(rows, lambda row: row["kinetic"], lambda row: row["delay"])
                x = sorted(found)
                top.plot([_root(k) for k in x], [found[k].mean for k in x], color=colour, label=f"{encoder} encoder")
                points = [(_root(row["kinetic"]), row["delay"]) for row in rows]
                top.scatter(*zip(*points, strict=True), color=colour, s=16, zorder=3)
        top.axhline(COLLAPSE_DELAY, color=MUTED, linewidth=1, linestyle=":")
        ticks = (0, 0.01, 0.04, 0.08, 0.16)
        top.set_xticks([_root(k) for k in ticks], [f"{k:g}" for k in ticks])
        top.set(xlabel="λ", ylabel="delay (0 synchronous, 1 extreme)", ylim=(-0.05, 1.05))
        top.legend(frameon=False)
        tau = torch.linspace(0, 1, 200)
        rows = evidence.some_probes(data=name, encoder="middle", variant="paper")
        kinetics = sorted({row["kinetic"] for row in rows})
        for place, kinetic in enumerate(kinetics):
            shade = _between(ink("offset"), ink("learned"), place / max(1, len(kinetics) - 1))
            for row in evidence.some_probes(data=name, encoder="middle", variant="paper", kinetic=kinetic):
                label = f"λ = {kinetic:g}" if row["seed"] == 0 else None
                below.plot(tau, curve_of(row)(tau).t[:, 0], color=shade, linewidth=1.3, label=label)
        below.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
        below.set(xlabel="semantic time = τ", ylabel="texture time")
        below.legend(frameon=False, fontsize=10)
    return figure


def probes(evidence: Evidence) -> Any:
    """The delay that every variant of the probe finds at the recommended lambda, a point for each seed."""
    name = evidence.sets()[0]
    rows = evidence.some_probes(data=name, encoder="middle", kinetic=LEARNED)
    if not rows:
        return None
    variants = sorted(dict.fromkeys(row["variant"] for row in rows), key=lambda v: v != "paper")
    figure, axes = _figure(1, 1, height=1.2 + 0.32 * len(variants))
    plot = axes[0, 0]
    usual = spread(rows, lambda row: row["variant"], lambda row: row["delay"])["paper"]
    plot.axvspan(min(usual.values), max(usual.values), color=ink("learned"), alpha=0.15, linewidth=0)
    for row in rows:
        colour = ink("learned") if row["variant"] == "paper" else INK
        plot.scatter(row["delay"], variants.index(row["variant"]), color=colour, s=26, zorder=3)
    plot.set_yticks(range(len(variants)), variants)
    plot.set(xlabel=f"delay at λ = {LEARNED:g}, {name}", xlim=(-0.03, 1.03))
    plot.invert_yaxis()
    return figure


HISTORIES: dict[str, tuple[str, str]] = {
    "paper": ("300 steps, three seeds", ink("learned")),
    "fourfold": ("1,200 steps", INK),
    "from-middle": ("from the middle of the family", ink("synchronous")),
    "from-extreme": ("from the extreme", ink("offset")),
    "rho-lr-third": ("rho at a third of the rate", ink("weak")),
    "frozen": ("denoiser frozen", ink("autoguidance")),
}
"""Variants of the probe whose course is drawn: label and colour."""


def convergence(evidence: Evidence) -> Any:
    """The delay of the current curve, step by step, for the paper's probe and some that start or go otherwise."""
    name = evidence.sets()[0]
    rows = evidence.some_probes(data=name, encoder="middle", kinetic=LEARNED)
    if not any(row["variant"] == "fourfold" for row in rows):
        return None
    figure, axes = _figure(1, 1)
    plot, shown = axes[0, 0], set[str]()
    for variant, (label, colour) in HISTORIES.items():
        for row in rows:
            if row["variant"] == variant and (variant == "paper" or row["seed"] == 0):
                x, y = zip(*row["delay_by_step"], strict=True)
                plot.plot(x, y, color=colour, linewidth=1.5, label=None if variant in shown else label)
                shown.add(variant)
    plot.set(xlabel="steps of the probe", ylabel=f"delay at λ = {LEARNED:g}", ylim=(-0.05, 1.05))
    plot.set_title(name, loc="left", color=INK)
    plot.legend(frameon=False, fontsize=10, loc="lower right")
    return figure


def arms(evidence: Evidence) -> Any:
    """The judge's distance of every arm, a point for each seed: above without guidance, below with AutoGuidance."""
    names = [name for name in evidence.sets() if evidence.some_scores(data=name)]
    if not names:
        return None
    figure, axes = _figure(2, len(names), height=3.0)
    for column, name in enumerate(names):
        for plot, (scale, title) in zip(axes[:, column], GUIDANCES.items(), strict=True):
            rows = evidence.some_scores(data=name, scale=scale)
            there = [arm for arm in ARMS if any(_arm(row) == arm for row in rows)]
            for place, arm in enumerate(there):
                found = [row["fd_judge"] for row in rows if _arm(row) == arm]
                _, colour, marker = ARMS[arm]
                plot.scatter(found, [place] * len(found), color=colour, marker=marker, s=30, zorder=3)
                plot.scatter(sum(found) / len(found), place, color=colour, marker="|", s=260)
            plot.set_yticks(range(len(there)), [ARMS[arm][0] for arm in there])
            plot.set(xlabel="distance by the judge", ylim=(len(there) - 0.4, -0.6))
            plot.margins(x=0.08)
            plot.set_title(f"{name}, {title}", loc="left", color=INK)
    return figure


def quality(evidence: Evidence) -> Any:
    """The judge's distance against evaluations of the solver, without guidance and with AutoGuidance."""
    names = [name for name in evidence.sets() if len(_seen(evidence, name, "steps")) > 1]
    if not names:
        return None
    figure, axes = _figure(len(names), 2)
    for line, name in zip(axes, names, strict=True):
        for plot, (scale, title) in zip(line, GUIDANCES.items(), strict=True):
            rows = evidence.some_scores(data=name, steps=None, scale=scale)
            _draw_arms(plot, rows, "steps")
            plot.set(xlabel="evaluations of the network", ylabel="distance by the judge", xscale="log")
            ticks = sorted({row["steps"] for row in rows})
            plot.set_xticks(ticks, [str(tick) for tick in ticks])
            plot.minorticks_off()
            plot.set_title(f"{name}, {title}", loc="left", color=INK)
        line[1].legend(frameon=False, fontsize=10, loc="upper right")
    return figure


def scales(evidence: Evidence) -> Any:
    """The judge's distance against the scale of AutoGuidance and of classifier-free guidance; 1 is none."""
    names = [name for name in evidence.sets() if len(_seen(evidence, name, "scale")) > 2]
    if not names:
        return None
    figure, axes = _figure(len(names), 2)
    for line, name in zip(axes, names, strict=True):
        ways = ((False, AUTO_SCALES, "AutoGuidance"), (True, FREE_SCALES, "classifier-free"))
        for plot, (free, tried, title) in zip(line, ways, strict=True):
            rows = evidence.some_scores(data=name, scale=None, free=None)
            rows = [row for row in rows if len(row["scale"]) < 2 and (row["free"] == free or not row["scale"])]
            _draw_arms(plot, [row | {"w": (row["scale"] or (1.0,))[0]} for row in rows], "w")
            plot.set(xlabel="scale w (1 is none)", ylabel="distance by the judge", xscale="log", ylim=(0, 7))
            ticks = (1.0, *(w for w in tried if w not in (1.35, 1.7)))  # they would overlap
            plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            plot.minorticks_off()
            plot.set_title(f"{name}, {title}", loc="left", color=INK)
        line[1].legend(frameon=False, fontsize=10, loc="lower left")
    return figure


def _seen(evidence: Evidence, name: str, key: str) -> set[Any]:
    return {row[key] for row in evidence.some_scores(data=name, steps=None, scale=None, free=None) if _arm(row) in ARMS}


def _draw_arms(plot: Any, rows: list[Row], key: str) -> None:
    """A line for each arm: the judge's distance against `key`, mean and standard deviation."""
    for arm, (label, colour, marker) in ARMS.items():
        found = spread([row for row in rows if _arm(row) == arm], lambda row: row[key], lambda row: row["fd_judge"])
        x = sorted(found)
        if x:
            plot.errorbar(
                x, [found[k].mean for k in x], [found[k].deviation for k in x],
                color=colour, marker=marker, label=label, capsize=2, elinewidth=1, linewidth=1.6,
            )  # fmt: skip


def _arm(row: Row) -> tuple[str, str]:
    return row["schedule"], row["variant"]


FAMILIES: dict[str, tuple[str, str, str, tuple[float, float]]] = {
    "mix": ("(1 − A) τ + A τ⁵, synchronous at 0", MUTED, "o", (0, 0)),
    "learned": ("learned, λ as written", ink("learned"), "o", (-4, -17)),
    "offset": ("offset as written, uncorrected", ink("offset"), "s", (6, 6)),
    "corrected": ("offset with the correction", ink("offset"), "P", (6, -14)),
    "path": ("best paths through the errors, λ as written", ink("autoguidance"), "D", (-12, 9)),
}
"""Label, colour, marker, and where what is written stands."""
FARTHEST = -0.5
"""Delay at which the figure ends; texture still further ahead is off its scale."""


def oracle(evidence: Evidence) -> Any:
    """The judge's distance of models trained on each curve, against the curve's delay; right, with AutoGuidance."""
    name = evidence.sets()[0]
    if not any(row["schedule"].startswith("mix") for row in evidence.some_scores(data=name)):
        return None
    figure, axes = _figure(1, 2)
    for plot, (scale, title) in zip(axes[0], GUIDANCES.items(), strict=True):
        rows = evidence.some_scores(data=name, scale=scale)
        for kind, (label, colour, marker, where) in FAMILIES.items():
            mine = [row for row in rows if _family(row) == kind and _delay(evidence, row) > FARTHEST]
            delays = spread(mine, lambda row: row["schedule"], lambda row: _delay(evidence, row))
            found = spread(mine, lambda row: row["schedule"], lambda row: row["fd_judge"])
            order = sorted(found, key=lambda key: delays[key].mean)
            plot.errorbar(
                [delays[key].mean for key in order], [found[key].mean for key in order],
                [found[key].deviation for key in order], [delays[key].deviation for key in order],
                color=colour, marker=marker, label=label, capsize=2, elinewidth=1,
                linestyle="-" if kind == "mix" else "none",
            )  # fmt: skip
            for key in order if kind != "mix" else ():
                weights = "" if kind != "path" else f"{key.partition('/')[2].partition(':')[0][0]} "
                text = weights + key.partition(":")[2]
                place = (delays[key].mean, found[key].mean)
                plot.annotate(text, place, where, textcoords="offset points", color=colour, fontsize=10)
        plot.set(xlabel="delay of the curve (below 0: texture first)", ylabel="distance by the judge")
        plot.set_title(f"{name}, {title}", loc="left", color=INK)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=10
    )
    return figure


def surfaces(evidence: Evidence) -> Any:
    """Where it pays to pass below or above, by the errors of one denoiser of independent times, mean over the seeds."""
    rows = [row for row in evidence.surfaces if row["encoder"] == "middle"]
    names = list(dict.fromkeys(row["data"] for row in rows))
    if not names:
        return None
    figure, axes = _figure(len(names), 2, height=4.6)
    for line, name in zip(axes, names, strict=True):
        mine = [row for row in rows if row["data"] == name]
        mean = {
            key: torch.tensor([row[key] for row in mine], dtype=torch.float64).mean(dim=0)
            for key in ("errors", "speeds")
        }
        times = torch.linspace(0, 1, mine[0]["points"], dtype=torch.float64)
        surface = ErrorSurface(LatentSpec.from_dict(mine[0]["groups"]), times, mean["errors"], mean["speeds"])
        for plot, weights in zip(line, get_args(Weights), strict=True):
            paths = {f"λ = {k:g}": best_path(surface, kinetic=k, weights=weights) for k in (0.02, 0.0, 0.08)}
            paint_surface(figure, plot, surface, paths, weights)
            plot.set_title(f"{name}: {weights}", loc="left", color=INK)
    return figure


def curve_of(row: Row) -> Schedule:
    """The schedule that a probe's row holds."""
    return schedule_from_dict({"format": "lwd-schedule/1", **row["schedule"]}).frozen()


def delay_of(schedule: Schedule) -> float:
    """The area between diagonal and path in the square of local times, as a share of that of tau^5: for curves of the
    paper's family the same as `lwd.probe.delay`."""
    t = schedule.double()(torch.linspace(0, 1, 4001, dtype=torch.float64)).t
    area = float(torch.trapezoid(t[:, 0], t[:, 1]))
    return (0.5 - area) / (0.5 - 1 / 6)


def _family(row: Row) -> str:
    kind = row["schedule"].partition(":")[0]
    if kind == "synchronous" and not row["variant"]:
        return "mix"
    if kind == "offset":
        return {"uncorrected": "offset", "": "corrected"}.get(row["variant"], "")
    if "along" in row["schedule"] or row["variant"]:
        return ""
    return "path" if kind.startswith("path/") else kind


def _delay(evidence: Evidence, row: Row) -> float:
    kind, _, value = row["schedule"].partition(":")
    if kind == "mix":
        return float(value)
    if kind == "learned":
        wanted = {"data": row["data"], "encoder": row["encoder"], "seed": row["seed"], "variant": "paper"}
        return float(evidence.some_probes(kinetic=float(value), **wanted)[0]["delay"])
    if kind.startswith("path/"):
        asked = {"curve": "path", "weights": kind.partition("/")[2], "kinetic": float(value)}
        surface = next(s for s in evidence.surfaces if all(s[k] == row[k] for k in ("data", "encoder", "seed")))
        return delay_of(curve_of(next(p for p in surface["paths"] if asked.items() <= p.items())))
    return delay_of(make_schedule(row["schedule"], ("texture", "semantic")))


def _root(kinetic: float) -> float:
    """Where a lambda is drawn: small ones apart, 0 on the axis."""
    return kinetic**0.5


def _between(first: str, last: str, share: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple((1 - share) * np.array(to_rgb(first)) + share * np.array(to_rgb(last)))
