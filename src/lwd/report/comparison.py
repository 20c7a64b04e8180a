"""The paper's tables from evaluations, beside the published numbers (LWD Tables 1-3).

A table compares what is comparable: features of one network, one reference, one number of images. Runs of one recipe
that differ in nothing but their seeds are one row: mean and standard deviation.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lwd.evaluation.inception import NAME as INCEPTION
from lwd.recipes.base import RECIPES, Published, Recipe
from lwd.report.collect import Result

NAMES = {
    "fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "precision", "recall": "recall",
    "fd_embedded": "distance, embedded network", "fd_judge": "distance, judge", "accuracy": "class accuracy",
}  # fmt: skip
RISING = ("inception_score", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Score:
    """One number of one or several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    def text(self) -> str:
        shown = digits(self.mean)
        if len(self.values) == 1:
            return shown
        places = len(shown.partition(".")[2])
        return f"{shown} ± {statistics.stdev(self.values):.{places}f} (n = {len(self.values)})"


@dataclass(frozen=True)
class Row:
    """A line of a table: a label, cells by column, and where it comes from.

    Attributes:
        kind: ``"own"``, or ``"published"`` for numbers that others report.
        note: of a published row, its source; of our own, what is not as the protocol asks.
    """

    label: str
    cells: Mapping[str, Score | str]
    kind: str = "own"
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows that may be compared.

    Attributes:
        columns: key and heading of every column.
        best: columns whose best own value is printed bold, and whether larger is better.
    """

    title: str
    about: str
    columns: Mapping[str, str]
    rows: Sequence[Row]
    best: Mapping[str, bool] = field(default_factory=dict)

    def is_best(self, row: Row, column: str) -> bool:
        scores = [r.cells[column] for r in self.rows if r.kind == "own" and isinstance(r.cells.get(column), Score)]
        mine = row.cells.get(column)
        if row.kind != "own" or column not in self.best or len(scores) < 2 or not isinstance(mine, Score):
            return False
        means = [score.mean for score in scores if isinstance(score, Score)]
        return mine.mean == (max(means) if self.best[column] else min(means))

    def to_dict(self) -> dict[str, Any]:
        def plain(cell: Score | str) -> Any:
            return {"mean": cell.mean, "values": list(cell.values)} if isinstance(cell, Score) else cell

        rows = [
            {"label": row.label, "kind": row.kind, "note": row.note}
            | {"cells": {key: plain(cell) for key, cell in row.cells.items()}}
            for row in self.rows
        ]
        return {"title": self.title, "about": self.about, "columns": dict(self.columns), "rows": rows}


def digits(value: float) -> str:
    """Three significant digits, but hundredths of numbers from 1 to 100, as FID is printed."""
    return f"{value:.2f}" if 1 <= abs(value) < 100 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def tables(results: Sequence[Result]) -> list[Table]:
    """All tables that the results allow, for every set of comparable ones."""
    settings: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        settings[result.comparable].append(result)
    found = []
    for group in settings.values():
        found += [*convergence(group), systems(group), *encoders(group)]
    return found


def convergence(results: Sequence[Result]) -> list[Table]:
    """Scores against training iterations (Table 1), guided and unguided apart; none where there are no two steps."""
    metric = leading(results)
    found = []
    for guidance in sorted({result.guidance for result in results}):
        chosen = [result for result in results if result.guidance == guidance and result.step is not None]
        steps = sorted({step for result in chosen if (step := result.step) is not None})
        if len(steps) < 2:
            continue
        rows = []
        for label, mine in _by(chosen, lambda r: (r.label, _schedule(r), r.sampler)):
            cells = {str(step): score for step, score in _scores(mine, metric).items()}
            rows.append(Row(" · ".join(filter(None, label)), cells, note=_notes(mine)))
            rows += _published_by_step(label[0], mine, steps, bool(guidance))
        columns = {str(step): f"{step:,}" for step in steps}
        title = f"{_name(metric)} by training iterations" + (f", {guidance}" if guidance else "")
        best = dict.fromkeys(columns, metric in RISING)
        found.append(Table(title, _about(results), columns, rows, best))
    return found


def systems(results: Sequence[Result]) -> Table:
    """All scores of every model at its last scored step (Table 2), with what was published for its recipe."""
    metrics = [key for result in results for key in result.metrics]
    columns = {key: _name(key) for key in dict.fromkeys(metrics)}
    columns |= {"step": "iterations", "parameters": "parameters", "guidance": "guidance", "evaluations": "evaluations"}
    # A finished run whose steps are not on record comes after all of its snapshots.
    last: dict[str, float] = {}
    for result in results:
        last[result.label] = max(last.get(result.label, 0), result.step or float("inf"))
    rows, told = [], set[str]()
    chosen = [result for result in results if (result.step or float("inf")) == last[result.label]]
    for label, mine in _by(chosen, lambda r: (r.label, _schedule(r), r.guidance, r.sampler)):
        first, cells = mine[0].origin, dict[str, Score | str]()
        for key in dict.fromkeys(metrics):
            if values := [result.metrics[key] for result in mine if key in result.metrics]:
                cells[key] = Score(tuple(values))
        cells["step"] = f"{first['step']:,}" if first.get("step") else ""
        cells["parameters"] = f"{first['parameters'] / 1e6:.1f}M" if first.get("parameters") else ""
        cells["guidance"] = mine[0].guidance
        used = [r.origin["evaluations"] for r in mine if r.origin.get("evaluations")]
        cells["evaluations"] = f"{statistics.fmean(used):.0f}" if used else ""
        rows.append(Row(" · ".join(filter(None, (label[0], label[1], label[3]))), cells, note=_notes(mine)))
        if label[0] in RECIPES and label[0] not in told and mine[0].network == INCEPTION:
            told.add(label[0])
            rows += [_published_row(label[0], row) for row in RECIPES[label[0]]().published]
    best = {key: key.split("_")[0] in RISING or key in RISING for key in dict.fromkeys(metrics)}
    return Table("All scores", _about(results), columns, rows, best)


def encoders(results: Sequence[Result]) -> list[Table]:
    """By semantic encoder and schedule at equal iterations (Table 3); none where one encoder made everything."""
    metric = leading(results)
    chosen = [result for result in results if not result.guidance and _encoder(result)]
    if len({_encoder(result) for result in chosen}) < 2:
        return []
    kinds = list(dict.fromkeys(_schedule(result) for result in chosen))
    rows = []
    for (encoder, step), mine in _by(chosen, lambda r: (_encoder(r), f"{r.step:,} iterations" if r.step else "")):
        cells: dict[str, Score | str] = {}
        for kind in kinds:
            if values := [r.metrics[metric] for r in mine if _schedule(r) == kind and metric in r.metrics]:
                cells[kind] = Score(tuple(values))
        rows.append(Row(" · ".join(filter(None, (encoder, step))), cells, note=_notes(mine)))
    if chosen[0].network == INCEPTION:
        for name, make in RECIPES.items():
            for row in make().published:
                if row.source.startswith("Table 3"):
                    kind = "learned" if make().schedule == "learned" else make().schedule
                    rows.append(
                        Row(f"{make().latents}", {kind: Score((row.fid,))}, "published", f"{name}: {row.source}")
                    )
                    kinds += [kind] if kind not in kinds else []
    title = f"{_name(metric)} by semantic encoder"
    return [Table(title, _about(results), {kind: kind for kind in kinds}, rows, dict.fromkeys(kinds, metric in RISING))]


def leading(results: Sequence[Result]) -> str:
    """The metric that tables of one number take: the first distance of the first result."""
    metrics = list(results[0].metrics)
    return next((key for key in metrics if key.startswith(("fid", "fd_judge", "fd_"))), metrics[0])


def published_curve(label: str, *, guided: bool) -> list[Published]:
    """What was published for checkpoints of the recipe `label`, by iterations."""
    if label not in RECIPES:
        return []
    rows = [row for row in RECIPES[label]().published if (row.guidance is not None) == guided]
    return sorted(rows, key=lambda row: row.iterations)


def _published_by_step(label: str, mine: Sequence[Result], steps: Sequence[int], guided: bool) -> list[Row]:
    if mine[0].network != INCEPTION:
        return []
    rows = [row for row in published_curve(label, guided=guided) if row.iterations in steps]
    if not rows:
        return []
    cells = {str(row.iterations): Score((row.fid,)) for row in rows}
    return [Row(label, cells, "published", ", ".join(dict.fromkeys(row.source for row in rows)))]


def _published_row(label: str, row: Published) -> Row:
    recipe: Recipe = RECIPES[label]()
    values = {
        "fid": row.fid, "sfid": row.sfid, "inception_score": row.inception_score, "precision": row.precision,
        "recall": row.recall,
    }  # fmt: skip
    cells: dict[str, Score | str] = {key: Score((value,)) for key, value in values.items() if value is not None}
    cells["step"] = f"{row.iterations:,}"
    cells["guidance"] = "" if row.guidance is None else f"AutoGuidance {row.guidance:g}"
    return Row(recipe.name, cells, "published", row.source)


def _scores(results: Sequence[Result], metric: str) -> dict[int, Score]:
    by_step: dict[int, list[float]] = defaultdict(list)
    for result in results:
        if result.step is not None and metric in result.metrics:
            by_step[result.step].append(result.metrics[metric])
    return {step: Score(tuple(values)) for step, values in by_step.items()}


def _by(results: Iterable[Result], key: Any) -> list[tuple[tuple[str, ...], list[Result]]]:
    groups: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return sorted(groups.items())


def _schedule(result: Result) -> str:
    """``"learned"``, or the kind of a fixed one."""
    kind = result.origin.get("schedule", {}).get("kind", "")
    return "learned" if kind == "polynomial" else str(kind)


def _encoder(result: Result) -> str:
    """The encoder of the group that leads, in a few words."""
    groups = result.origin.get("schedule", {}).get("groups") or [""]
    about = (result.origin.get("encoders") or {}).get(groups[-1])
    if not about:
        return ""
    network = about.get("network")
    of = network.get("network", "") if isinstance(network, Mapping) else str(network or "")
    return f"{about.get('encoder', '')} of {of}" if of else str(about.get("encoder", ""))


def _notes(results: Sequence[Result]) -> str:
    return "; ".join(dict.fromkeys(line for result in results for line in result.deviations))


def _about(results: Sequence[Result]) -> str:
    first = results[0]
    return f"features of {first.network}, reference {first.reference[0]}, {first.images:,} images"


def _name(metric: str) -> str:
    return NAMES.get(metric) or metric.replace("fd_", "distance, ").replace("_", " ")
