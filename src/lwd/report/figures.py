"""The line plots, each one panel as an SVG that takes its colours and its font from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lwd.files import write_atomically
from lwd.report.read import Array
from lwd.report.style import COLOURS, MARKERS, ink, with_variables
from lwd.report.words import noun
from lwd.schedules import schedule_from_dict

INK, MUTED, RULE, PAPER = (COLOURS[name].light for name in ("ink", "muted", "rule", "paper"))
MAX_POINTS = 300
"""Points of a curve of log lines; longer logs are averaged down to it."""


STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lwd",
    "font.size": 12.5,
    "text.color": MUTED,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 1.2,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.9,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "xtick.major.pad": 7,
    "ytick.major.pad": 6,
    "lines.linewidth": 2.2,
    "lines.markersize": 6.5,
    "lines.markeredgecolor": PAPER,
    "lines.markeredgewidth": 1.2,
    "lines.solid_capstyle": "round",
}


class Panel(NamedTuple):
    """What `panel` draws."""

    draw: Callable[[Any], None]
    title: str
    xlabel: str


def save_panels(panels: Sequence[Panel], path: Path, labels: Sequence[str]) -> Path:
    """The panels side by side as a PNG.

    Args:
        labels: of the last lines of the first panel, for a legend below.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "lwd[demo]"') from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.7 * len(panels), 4.6), layout="constrained", facecolor=PAPER)
        for axes, shown in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.set_facecolor(PAPER)
            _draw(axes, shown)
        lines = figure.axes[0].lines[-len(labels) :]
        figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        return write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def panel(draw: Callable[[Any], None], title: str, xlabel: str, *, width: int = 480, height: int = 330) -> str:
    """One set of axes as inline SVG.

    Args:
        draw: gets matplotlib's axes.
        title: what the vertical axis shows; written above it, where it needs no turned head.
        width, height: CSS pixels at natural size.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the report needs matplotlib: pip install "lwd[demo]"') from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        _draw(figure.subplots(), Panel(draw, title, xlabel))
        return _to_svg(figure, f"{title}, against {xlabel}")


def _draw(axes: Any, shown: Panel) -> None:
    axes.set_title(shown.title, loc="left", fontsize=12.5, color=MUTED, pad=12)
    axes.set_xlabel(shown.xlabel, labelpad=6)
    shown.draw(axes)


def _to_svg(figure: Any, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # it would apply to the whole page
    svg = re.sub(r'<g id="[^"]*"/>', "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # nothing refers to these, and several figures share a page
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\n\s*", "\n", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg class="plot" role="img" aria-label="{escape(label)}" {view[0]}>', svg, count=1)
    return with_variables(svg)


# --- schedules -----------------------------------------------------------------------------------------------------


def local_times(schedule: Mapping[str, Any], tau: Array) -> Array:
    """[K, G] of the schedule that a file describes."""
    with torch.no_grad():
        t: Array = schedule_from_dict(dict(schedule))(torch.from_numpy(tau)).t.numpy()
    return t


def run_style(run: Mapping[str, Any], picked: float | None, rank: float) -> dict[str, Any]:
    """The line of one lambda: the picked one in the colour of the learned arm, the others grey, darker for larger
    lambda, dashed where collapsed; `rank` runs from 0 to 1."""
    if run["kinetic"] == picked:
        return {"color": ink("learned"), "linewidth": 3.2, "zorder": 4}
    dashes = {"linestyle": (0, (4, 2.2))} if run["collapsed"] else {}
    return {"color": INK, "alpha": 0.28 + 0.5 * rank, "linewidth": 1.8, **dashes}


def ranks(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Position of every run between the weakest (0) and the strongest (1) lambda."""
    return [i / max(1, len(runs) - 1) for i in range(len(runs))]


def sweep_curves(sweep: Mapping[str, Any]) -> Panel:
    """The texture's local time against global time, for every lambda (the paper's Figure 2)."""
    runs = sweep["runs"]
    tau = np.linspace(0, 1, 101)
    degree = runs[0]["schedule"]["parameters"].get("degree", 4)

    def draw(axes: Any) -> None:
        axes.plot(tau, tau, color=MUTED, linewidth=1.3, linestyle=":")
        axes.plot(tau, tau ** (degree + 1), color=MUTED, linewidth=1.3, linestyle=":")
        for run, rank in zip(runs, ranks(runs), strict=True):
            axes.plot(tau, local_times(run["schedule"], tau)[:, 0], **run_style(run, sweep["picked"], rank))
        _unit_square(axes)
        axes.text(0.39, 0.46, "identity", ha="right")
        axes.text(0.79, 0.2, f"extreme: τ{_superscript(degree + 1)}")

    return Panel(draw, f"local time of the {noun(runs[0]['schedule']['groups'][0])}", "global time τ")


def sweep_convergence(sweep: Mapping[str, Any], burn_in: int | None) -> Panel:
    """The curve's value at tau = 1/2 against the probe's step."""
    runs = sweep["runs"]

    def draw(axes: Any) -> None:
        last = 1
        for run, rank in zip(runs, ranks(runs), strict=True):
            steps = [row["step"] for row in run["history"]]
            style = run_style(run, sweep["picked"], rank)
            values = [row["midpoint"][0] for row in run["history"]]
            axes.plot(steps, values, **style, **({"marker": "o"} if len(steps) == 1 else {}))
            last = max([last, *steps])
        axes.axhline(0.5, color=MUTED, linewidth=1.3, linestyle=":")
        axes.text(last, 0.51, "identity", ha="right", va="bottom")
        if burn_in and burn_in < last:
            axes.axvline(burn_in, color=MUTED, linewidth=1, linestyle=":")
            axes.text(burn_in + 0.015 * last, 0.575, "averaged from here", va="center")
        axes.set_xlim(0, last)
        axes.set_ylim(0, 0.6)

    return Panel(draw, f"local time of the {noun(runs[0]['schedule']['groups'][0])} at τ = 0.5", "probe step")


def arm_clocks(arms: Mapping[str, Any]) -> str:
    """Every group's local time against global time; the leading group dashed."""
    tau = np.linspace(0, 1, 201)

    def draw(axes: Any) -> None:
        for name, arm in reversed(list(arms.items())):  # the first arm on top, where curves coincide
            t = local_times(arm["schedule"], tau)
            axes.plot(tau, t[:, 0], color=ink(name), clip_on=False, zorder=3)
            axes.plot(tau, t[:, -1], color=ink(name), linestyle=(0, (3, 3)), clip_on=False, zorder=4)
        _unit_square(axes)

    return panel(draw, "local time", "global time τ")


def arm_paths(arms: Mapping[str, Any]) -> str:
    """The first group's local time against the last one's: the path itself, whatever the pace along it."""
    tau = np.linspace(0, 1, 401)
    first, *_, last = next(iter(arms.values()))["schedule"]["groups"]

    def draw(axes: Any) -> None:
        for name, arm in arms.items():
            t = local_times(arm["schedule"], tau)
            axes.plot(t[:, -1], t[:, 0], color=ink(name), clip_on=False, zorder=3)
        _unit_square(axes)

    return panel(draw, f"local time of the {noun(first)}", f"local time of the {noun(last)}")


def _unit_square(axes: Any) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.005)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


# --- quality and training ------------------------------------------------------------------------------------------


def quality(
    arms: Mapping[str, Any], key: str, series: str, x: str, floor: float | None, *, title: str, xlabel: str
) -> str:
    """A feature distance along training or against model evaluations.

    Args:
        key: ``"fd_embedded"`` or ``"fd_judge"``.
        series: ``"by_step"`` or ``"by_evaluations"``; an arm without one shows its final value as a single point.
        x: the entry of a point that goes on the horizontal axis.
        floor: distance of real images.
    """

    def draw(axes: Any) -> None:
        seen: dict[str, list[float]] = {"x": [], "y": []}
        for name, arm in arms.items():
            points = arm.get(series) or [{x: arm.get("steps", 0)} | arm["final"]]
            points = sorted(points, key=lambda point: point[x])
            xs, ys = [point[x] for point in points], [point[key] for point in points]
            axes.plot(xs, ys, color=ink(name), marker=MARKERS.get(name, "o"), clip_on=False, zorder=3)
            seen["x"] += xs
            seen["y"] += ys
        if floor is not None:
            axes.axhline(floor, color=MUTED, linewidth=1.3, linestyle=":")
            axes.annotate(
                "real images",
                (0.99, floor),
                (0, 4),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
            )
            seen["y"].append(floor)
        _value_axis(axes, seen["y"])
        if series == "by_evaluations":
            axes.set_xscale("log", base=2)
            _ticks(axes.xaxis, sorted(set(seen["x"])))
        else:
            axes.set_xlim(left=0)
            _ticks(axes.xaxis, [0, *sorted(set(seen["x"]))])

    return panel(draw, title, xlabel)


def _value_axis(axes: Any, values: Sequence[float]) -> None:
    """From zero, or logarithmic where the values span too much for that."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [value for value in values if value > 0]
    if positive and max(positive) > 8 * min(positive):
        axes.set_yscale("log")
        decades = np.log10(max(positive) / min(positive))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(min(positive) / 1.35, max(positive) * 1.25)
    else:
        axes.set_ylim(0, max(values) * 1.08 or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at the values themselves where they are few."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if len(values) <= 6:
        axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def training_curve(logs: Mapping[str, Sequence[Mapping[str, Any]]], key: str, title: str) -> str:
    """One logged value against the training step, for every arm that logged it."""

    def draw(axes: Any) -> None:
        settled = []
        for name, rows in logs.items():
            rows = [row for row in rows if key in row]
            if not rows:
                continue
            steps = _thinned([row["step"] for row in rows])
            values = _thinned([row[key] for row in rows])
            axes.plot(steps, values, color=ink(name), linewidth=1.8, marker="o" if len(steps) == 1 else None)
            settled += list(values[len(values) // 20 :])  # the first steps would squeeze the rest
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        spread = max(settled) - min(settled) or 1.0
        axes.set_ylim(min(settled) - 0.06 * spread, max(settled) + 0.06 * spread)

    return panel(draw, title, "training step", width=380, height=300)


def _thinned(values: Sequence[float]) -> Array:
    array = np.asarray(values, dtype=np.float64)
    return np.array([part.mean() for part in np.array_split(array, min(len(array), MAX_POINTS))])
