"""The table that `lwd recipes` prints."""

from __future__ import annotations

import textwrap

from lwd.cost import GIB, H100, Card
from lwd.recipes.base import RECIPES, Published, Recipe
from lwd.recipes.budget import cost_of

_COLUMNS = ("name", "steps x batch", "epochs", "params", "GPU-h", "memory", "FID", "summary")
_WIDTH = 120


def table(card: Card = H100) -> list[str]:
    """One row per recipe, at most 120 columns wide: what it runs, what that costs on `card`, what was published."""
    rows = [_row(make(), card) for make in RECIPES.values()]
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS) - 1)]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for number, row in enumerate([_COLUMNS, *rows]):
        name, *cells = row[:-1]
        # Names to the left, figures to the right.
        start = "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))])
        wrapped = textwrap.wrap(row[-1], _WIDTH - indent)
        lines.append(f"{start}  {wrapped[0]}")
        lines.extend(" " * indent + rest for rest in wrapped[1:])
        if number == 0:
            lines.append("-" * _WIDTH)
    return [*lines, "", *_notes(card)]


def _row(recipe: Recipe, card: Card) -> tuple[str, ...]:
    cost = cost_of(recipe, card)
    return (
        recipe.name,
        f"{_short(recipe.train.steps)} x {recipe.train.batch_size}",
        f"{cost.epochs:.0f}",
        f"{cost.denoiser_parameters / 1e6:.0f}M",
        _hours(cost.training_hours + cost.probe_hours),
        f"{cost.state / GIB:.1f}+{cost.activations / GIB:.2f}n",
        _fid(recipe.published),
        recipe.summary,
    )


def _notes(card: Card) -> list[str]:
    text = (
        f"GPU-h: {card.name} at {card.utilisation:.0%} of its peak in bf16 (estimate; one probe and the training; "
        "small networks reach less). memory: GiB on a GPU that takes n images at a time, without compilation and "
        "recomputation (estimate); the global batch is fixed, n is not. FID: published for the last iteration, with "
        "AutoGuidance in brackets; not measured with this implementation. Other iterations: `Recipe.published`."
    )
    return textwrap.wrap(text, _WIDTH)


def _fid(published: tuple[Published, ...]) -> str:
    """Unguided (guided) FID of the last published iteration."""
    last = max((row.iterations for row in published), default=0)
    final = {row.guidance is not None: f"{row.fid:.2f}" for row in published if row.iterations == last}
    return f"{final.get(False, '')} ({final[True]})".strip() if True in final else final.get(False, "-")


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}" if hours >= 0.1 else "<0.1"


def _short(count: int) -> str:
    """1,400 as it is, 70,000 as 70K, 3,000,000 as 3M."""
    for unit, letter in ((1_000_000, "M"), (1_000, "K")):
        if count >= unit and count % unit == 0:
            return f"{count // unit}{letter}"
    return f"{count:,}"
