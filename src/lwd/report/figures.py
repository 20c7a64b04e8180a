"""The page's figures: line plots as inline SVG, images as PNG data URIs.

Colours in the SVG are CSS variables, so that the same drawing serves the light and the dark theme, and text stays
text in the page's own font.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lwd.report.inputs import Inputs
from lwd.schedules import schedule_from_dict

# Light and dark value of every colour; those of the arms are told apart by readers with any colour vision (Okabe-Ito).
PALETTE = {
    "ink": ("#1d2127", "#e8eaed"),
    "muted": ("#5b6470", "#a2abb6"),
    "faint": ("#dfe3e8", "#333a43"),
    "card": ("#fffffe", "#1a1e24"),
    "learned": ("#0072b2", "#4ba8e0"),
    "offset": ("#d55e00", "#f08a3c"),
    "synchronous": ("#008f6b", "#2fc49b"),
    "autoguidance": ("#a8508a", "#dc8fc0"),
    "weak": ("#8a929c", "#7c8591"),
    "weakest": ("#c3c9d1", "#4d5560"),
    "strongest": ("#39424d", "#c9d0d8"),
}
MARKERS = {"learned": "o", "offset": "s", "synchronous": "^", "autoguidance": "D", "weak": "v"}
RAMP = 8  # steps between "weakest" and "strongest", for lambda


def ramp_name(position: int, count: int) -> str:
    """The colour of the `position`-th of `count` lambdas."""
    return f"ramp{round((RAMP - 1) * position / max(1, count - 1))}"


def css_colors(theme: int) -> dict[str, str]:
    """Every colour variable; theme 0 is light, 1 dark."""
    colors = {name: pair[theme] for name, pair in PALETTE.items()}
    ends = [np.array([int(colors[end][i : i + 2], 16) for i in (1, 3, 5)]) for end in ("weakest", "strongest")]
    for k in range(RAMP):
        mixed = np.rint(ends[0] + (ends[1] - ends[0]) * k / (RAMP - 1)).astype(int)
        colors[f"ramp{k}"] = "#" + "".join(f"{value:02x}" for value in mixed)
    return colors


C = css_colors(0)


def panel(name: str, description: str, draw: Callable[[Any], None], size: tuple[float, float] = (4.8, 3.4)) -> str:
    """One plot as inline SVG.

    Args:
        name: prefix of all ids in it; unique on the page.
        description: for readers who do not see it.
        draw: draws on a matplotlib `Axes`.
        size: inches at 72 pixels; the page scales it.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the report draws with matplotlib; install it with: pip install "lwd[demo]"') from error
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.titleweight": "bold",
        "axes.titlecolor": C["ink"],
        "axes.labelsize": 9,
        "axes.labelcolor": C["muted"],
        "axes.edgecolor": C["muted"],
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": C["faint"],
        "grid.linewidth": 0.6,
        "text.color": C["ink"],
        "xtick.color": C["muted"],
        "ytick.color": C["muted"],
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "xtick.major.pad": 5,
        "ytick.major.pad": 5,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "lines.markersize": 5,
        "lines.markeredgecolor": C["card"],
        "lines.markeredgewidth": 0.8,
    }
    with rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, description)


def _inline(svg: str, name: str, description: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for variable, color in C.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1).strip()


# --- schedules ---------------------------------------------------------------------------------------------------


def local_times(described: dict[str, Any], points: int = 201) -> tuple[NDArray[Any], NDArray[Any]]:
    """tau [K] and local times [K, G] of a schedule, its kinks included."""
    schedule = schedule_from_dict(described).frozen()
    tau = torch.tensor(sorted({*np.linspace(0, 1, points).tolist(), *schedule.kinks}), dtype=torch.float64)
    return tau.numpy(), schedule.local_times(tau).t.numpy()


def midpoint(described: dict[str, Any]) -> float:
    """Local time of the first group at tau = 1/2."""
    return float(schedule_from_dict(described).local_times(torch.tensor([0.5], dtype=torch.float64)).t[0, 0])


def _unit_square(axes: Any, x: str, y: str, title: str) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel=x, ylabel=y, title=title)
    axes.set_xticks(np.linspace(0, 1, 5), ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_yticks(np.linspace(0, 1, 5), ["0", "0.25", "0.5", "0.75", "1"])


def _sweep_style(inputs: Inputs, position: int) -> dict[str, Any]:
    run = inputs.runs[position]
    used = run is inputs.used
    return {
        "color": C["learned"] if used else C[ramp_name(position, len(inputs.runs))],
        "linewidth": 2.8 if used else 1.5,
        "linestyle": (0, (3.5, 2)) if run["collapsed"] else "solid",
        "zorder": 4 if used else 3,
    }


def sweep_curves(inputs: Inputs) -> str:
    """The paper's Figure 2: the learned curve for every lambda, between the identity and the extreme."""
    degree = inputs.runs[0]["schedule"]["parameters"].get("degree", 4)

    def draw(axes: Any) -> None:
        tau = np.linspace(0, 1, 201)
        reference = {"color": C["muted"], "linewidth": 0.9, "linestyle": (0, (1, 2)), "zorder": 2}
        axes.plot(tau, tau, **reference)
        axes.plot(tau, tau ** (degree + 1), **reference)
        note = {"color": C["muted"], "fontsize": 8.5}
        axes.text(0.30, 0.335, "identity", rotation=41, ha="center", va="bottom", **note)
        axes.text(0.985, 0.60, f"extreme, τ{_superscript(degree + 1)}", ha="right", va="top", **note)
        for position, run in enumerate(inputs.runs):
            tau, t = local_times(run["schedule"])
            axes.plot(tau, t[:, 0], **_sweep_style(inputs, position))
        _unit_square(axes, "global time τ", "texture's local time", "What each λ learned")

    return panel("sweep", "Texture time against global time for every lambda", draw, (4.8, 4.0))


def sweep_history(inputs: Inputs) -> str:
    """The texture's time half-way through, at every step of every probe."""

    def draw(axes: Any) -> None:
        ends = []
        for position, run in enumerate(inputs.runs):
            lines = [line for line in run["history"] if "midpoint" in line]
            if lines:
                values = [line["midpoint"][0] for line in lines]
                axes.plot([line["step"] for line in lines], values, **_sweep_style(inputs, position))
                ends.append((values[-1], run))
        last = max(line["step"] for run in inputs.runs for line in run["history"])
        top = 0.02 + max(0.5, *(line["midpoint"][0] for run in inputs.runs for line in run["history"]))
        ends.sort(key=lambda end: end[0])
        heights = spread([value for value, _ in ends], gap=0.056 * top, top=top)
        for height, (_, run) in zip(heights, ends, strict=True):
            used = run is inputs.used
            axes.text(
                last * 1.025,
                height,
                f"{run['kinetic']:g}",
                va="center",
                fontsize=8.5,
                color=C["learned"] if used else C["muted"],
                fontweight="bold" if used else "normal",
            )
        axes.text(last * 1.025, top * 1.0, "λ", va="bottom", fontsize=9, color=C["muted"])
        burn_in = inputs.setting("probe", "burn_in")
        if burn_in and burn_in < last:
            axes.axvspan(burn_in, last, color=C["faint"], alpha=0.45, linewidth=0, zorder=0)
            axes.text((burn_in + last) / 2, 0.012, "averaged", ha="center", va="bottom", fontsize=8.5, color=C["muted"])
        axes.set(xlim=(0, last), ylim=(0, top), xlabel="probe step", ylabel="texture's local time at τ = 0.5")
        axes.set_title("How the probes got there")

    return panel("probe", "Texture time at half of global time against probe step, for every lambda", draw, (4.8, 4.0))


def spread(values: Sequence[float], gap: float, top: float) -> list[float]:
    """Ascending label heights near `values` (ascending), at least `gap` apart and, where that fits, in [0, top]."""
    heights: list[float] = []
    for value in values:
        heights.append(max(value, heights[-1] + gap) if heights else max(value, gap / 2))
    limit = top - gap / 2
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - gap
    return heights


def schedule_times(inputs: Inputs) -> str:
    """Both local times against global time, for the arms with a schedule of their own."""

    def draw(axes: Any) -> None:
        for arm in _scheduled(inputs):
            tau, t = local_times(inputs.arms[arm]["schedule"])
            axes.plot(tau, t[:, 0], color=C[arm], zorder=4 if arm == "learned" else 3)
            axes.plot(tau, t[:, -1], color=C[arm], linestyle=(0, (3.5, 2)), linewidth=1.3)
        _unit_square(axes, "global time τ", "local time", "Local times: texture solid, semantic dashed")

    return panel("times", "Local times of both groups against global time, for three schedules", draw, (4.8, 4.0))


def schedule_paths(inputs: Inputs) -> str:
    """The way of each schedule through the square of local times."""

    def draw(axes: Any) -> None:
        for arm in _scheduled(inputs):
            _, t = local_times(inputs.arms[arm]["schedule"])
            axes.plot(t[:, -1], t[:, 0], color=C[arm], clip_on=False, zorder=4 if arm == "learned" else 3)
        _unit_square(axes, "semantic's local time", "texture's local time", "One against the other")

    return panel("paths", "Texture time against semantic time, for three schedules", draw, (4.8, 4.0))


def _scheduled(inputs: Inputs) -> list[str]:
    return [arm for arm in inputs.arms if arm != "autoguidance"]


def _superscript(number: int) -> str:
    return "".join("⁰¹²³⁴⁵⁶⁷⁸⁹"[int(digit)] for digit in str(number))


# --- quality and training ----------------------------------------------------------------------------------------


def quality(inputs: Inputs, rows: str, x: str, distance: str, title: str, label: str) -> str:
    """A feature distance against training steps or evaluations, one line per arm.

    Args:
        rows: ``"by_step"`` or ``"by_evaluations"`` of the results.
        x: the entry that goes on the horizontal axis.
        distance: ``"fd_judge"`` or ``"fd_embedded"``.
    """

    def draw(axes: Any) -> None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        ticks: set[int] = set()
        lowest, highest = np.inf, 0.0
        for arm, found in inputs.arms.items():
            points = sorted((row[x], row[distance]) for row in found.get(rows, []))
            if points:
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, color=C[arm], marker=MARKERS[arm], clip_on=False, zorder=4 if arm == "learned" else 3)
                ticks |= set(xs)
                lowest, highest = min(lowest, *ys), max(highest, *ys)
        guided = inputs.arms.get("autoguidance", {}).get("final", {})
        if rows == "by_evaluations" and distance in guided and x in guided:
            marker = MARKERS["autoguidance"]
            axes.plot([guided[x]], [guided[distance]], color=C["autoguidance"], marker=marker, clip_on=False, zorder=5)
            ticks.add(guided[x])
            lowest, highest = min(lowest, guided[distance]), max(highest, guided[distance])
        floor = inputs.results.get("floor", {}).get(distance)
        axes.set_yscale("log")
        axes.set_ylim(min(lowest, floor or lowest) / 1.25, highest * 1.25)
        if floor:
            axes.axhline(floor, color=C["muted"], linewidth=0.9, linestyle=(0, (1, 2)))
            axes.text(0.995, floor, "real images", transform=axes.get_yaxis_transform(), ha="right", va="bottom",
                      fontsize=8.5, color=C["muted"])  # fmt: skip
        if rows == "by_evaluations":
            axes.set_xscale("log")
        else:
            axes.set_xlim(0, max(ticks) * 1.02)
        axes.set_xticks(sorted(ticks), [f"{tick:,}" for tick in sorted(ticks)])
        axes.xaxis.set_minor_formatter(NullFormatter())
        wide = axes.get_ylim()[1] / axes.get_ylim()[0] > 40
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1, 2, 5), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=label, ylabel="feature distance (log)", title=title)
        axes.grid(visible=False, axis="x")

    return panel(f"{rows}-{distance}".replace("_", "-"), f"Feature distance against {label}, {title}", draw)


def training(inputs: Inputs, metric: str, title: str) -> str:
    """One metric of all trainings against the step; the middle 98 % of the values fill the axis."""

    def draw(axes: Any) -> None:
        values = []
        for arm, lines in inputs.training.items():
            points = [(line["step"], line[metric]) for line in lines if metric in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=C[arm], linewidth=1.3, zorder=4 if arm == "learned" else 3)
                values += [value for _, value in points]
        low, high = np.quantile(values, [0.0, 0.98])
        margin = 0.08 * (high - low) or 0.1
        axes.set(xlabel="training step", ylabel="loss", title=title, ylim=(low - margin, high + margin))
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="x")

    return panel(f"training-{metric}".replace("_", "-"), f"{title} against training step, for every arm", draw)


# --- images ------------------------------------------------------------------------------------------------------


def grid(images: NDArray[Any], labels: NDArray[Any], columns: int) -> tuple[str, list[int]]:
    """The first `columns` images of every class as one PNG, a row per class; returns its data URI and the classes."""
    classes = sorted(set(labels.tolist()))
    height, width = images.shape[1:3]
    # One transparent pixel around every image, so that all rows are the same share of the whole.
    sheet = np.zeros((len(classes) * (height + 2), columns * (width + 2), 2), dtype=np.uint8)
    for row, label in enumerate(classes):
        for column, image in enumerate(images[labels == label][:columns]):
            y, x = row * (height + 2) + 1, column * (width + 2) + 1
            sheet[y : y + height, x : x + width, 0] = image
            sheet[y : y + height, x : x + width, 1] = 255
    return png(sheet), classes


def png(image: NDArray[Any], scale: int = 2) -> str:
    """Data URI of a uint8 image [H, W], [H, W, 2] (with alpha) or [H, W, 3], every pixel `scale` pixels wide.

    Enlarged here and not by the browser alone, which would blur such small images.
    """
    try:
        from PIL import Image  # comes with matplotlib
    except ImportError as error:
        raise ImportError('the report needs matplotlib and Pillow; install them: pip install "lwd[demo]"') from error
    buffer = io.BytesIO()
    enlarged = np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
    Image.fromarray(np.ascontiguousarray(enlarged)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

