"""The figure of an error surface: which side of a path is the cheaper one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lwd.files import write_atomically
from lwd.report.figures import INK, PAPER, STYLE
from lwd.report.style import ink
from lwd.schedules import Schedule
from lwd.surface import ErrorSurface, Weights

_LINES = ("--", ":", "-.")


def circulation(surface: ErrorSurface, weights: Weights, points: int = 96) -> Tensor:
    """What going below a point costs more than going above it, per area, [points, points]; axes as in the surface.

    The sums of errors along two paths with the same ends differ by the integral of this between them (Green), so it is
    0 for an exact denoiser in the weights of information. Negative: the second group had better go first.
    """
    axis = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    t = torch.cartesian_prod(axis, axis)
    step = 1 / (2 * points)

    def pull(group: int, along: int, sign: int) -> Tensor:
        """A_group = W l_group shares, half a cell further along the other group's time."""
        shifted = t.clone()
        shifted[:, along] += sign * step
        speed = torch.zeros_like(t)
        speed[:, group] = 1.0
        return surface.density(shifted, speed, weights=weights)

    first = (pull(0, 1, 1) - pull(0, 1, -1)) / (2 * step)
    second = (pull(1, 0, 1) - pull(1, 0, -1)) / (2 * step)
    return (first - second).view(points, points)


def draw_surface(surface: ErrorSurface, paths: Mapping[str, Schedule], path: Path, weights: Weights) -> Path:
    """Draw `circulation`, and paths through it, as a PNG.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "lwd[demo]"') from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 6.2), layout="constrained", facecolor=PAPER)
        paint_surface(figure, figure.subplots(), surface, paths, weights)
        return write_atomically(path, partial(figure.savefig, format="png", dpi=110))


def paint_surface(
    figure: Any, axes: Any, surface: ErrorSurface, paths: Mapping[str, Schedule], weights: Weights
) -> None:
    """`draw_surface` on axes of matplotlib."""
    from matplotlib.colors import LinearSegmentedColormap

    found = circulation(surface, weights)
    bound = float(found.abs().quantile(0.98)) or 1.0
    colours = LinearSegmentedColormap.from_list("sides", [ink("learned"), PAPER, ink("offset")])
    first, last = surface.spec.names
    image = axes.imshow(
        found, origin="lower", extent=(0, 1, 0, 1), cmap=colours, vmin=-bound, vmax=bound, interpolation="bilinear"
    )
    tau = torch.linspace(0, 1, 400, dtype=torch.float64)
    for number, (name, schedule) in enumerate(paths.items()):
        t = schedule.frozen().cpu().double()(tau).t
        line, width = ("-", 3.0) if number == 0 else (_LINES[(number - 1) % len(_LINES)], 1.8)
        axes.plot(t[:, 1], t[:, 0], color=INK, linestyle=line, linewidth=width, label=name)
    axes.grid(False)
    axes.set(xlabel=f"local time of {last}", ylabel=f"local time of {first}", xlim=(0, 1), ylim=(0, 1))
    axes.legend(loc="lower right", labelcolor=INK, facecolor=PAPER, framealpha=0.8, edgecolor="none")
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label(f"blue: better below, {last} first\norange: better above, {first} first")
