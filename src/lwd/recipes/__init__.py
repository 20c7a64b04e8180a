"""Named experiments, as functions that return configurations.

A recipe says everything that decides a run except where its data lie: latent groups, backbone, schedule, probe and
training, and what was published for it. `lwd recipes` lists them; `lwd probe` and `lwd train` take one by name.

How the work is divided among machines (processes, micro-batches, recomputed blocks) is no part of a recipe: the global
batch is fixed here, and `lwd.recipes.budget` says what fits.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from lwd.recipes import embedded, imagenet, small  # noqa: F401  (each fills the registry, in this order)
from lwd.recipes.base import ITERATIONS_PER_EPOCH, PAPER_SWEEP, RECIPES, Published, Recipe
from lwd.recipes.listing import table
from lwd.schedules import (
    CascadedSchedule,
    IndependentTimes,
    OffsetSchedule,
    Schedule,
    ShiftedSchedule,
    SynchronousSchedule,
    load_schedule,
)

__all__ = [
    "ITERATIONS_PER_EPOCH",
    "PAPER_SWEEP",
    "RECIPES",
    "Published",
    "Recipe",
    "get_recipe",
    "make_schedule",
    "table",
]


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`; ValueError with the nearest names when there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.3)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"no recipe {name!r}.{hint} `lwd recipes` lists them.")
    return RECIPES[name]()


def make_schedule(text: str, names: Sequence[str]) -> Schedule:
    """A schedule from the command line: ``synchronous``, ``cascaded``, ``offset``, ``offset:0.5``, ``shifted:1,3``,
    ``independent``, or the path of a schedule file."""
    kind, _, argument = text.partition(":")
    groups = len(names)
    try:
        match kind:
            case "synchronous" if not argument:
                return SynchronousSchedule(groups, names)
            case "cascaded" if not argument:
                return CascadedSchedule(groups, names)
            case "independent" if not argument:
                return IndependentTimes(groups, names)
            case "offset":
                return OffsetSchedule(float(argument or 0.3), groups, names)
            case "shifted":
                return ShiftedSchedule([float(a) for a in argument.split(",")], groups, names)
    except ValueError as error:
        raise ValueError(f"schedule {text!r}: {error}") from error
    if not Path(text).exists():
        raise ValueError(
            f"no schedule {text!r}: give synchronous, cascaded, offset[:delta], shifted:a,b, independent or a schedule "
            "file"
        )
    return load_schedule(text, names)
