"""The paper's tables from evaluations, beside the published numbers (LWD Tables 1-3).

A table compares what is comparable: features of one network, one reference, one number of images. Runs of one recipe
that differ in nothing but their seeds are one row: mean and standard deviation. Bold is the best among rows that
depart from the protocol in the same way.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lwd.evaluation.inception import NAME as INCEPTION
from lwd.recipes.base import RECIPES, Published, Recipe
from lwd.recipes.literature import OTHER_CONVERGENCE, OTHER_SYSTEMS
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
        rivals = [r for r in self.rows if r.kind == "own" and r.note == row.note]
        scores = [r.cells[column] for r in rivals if isinstance(r.cells.get(column), Score)]
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
        found += [*convergence(group), *systems(group), *encoders(group)]
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
        rows, told = [], set[str]()
        for mine in _experiments(chosen):
            cells = {str(step): score for step, score in _scores(mine, metric).items()}
            rows.append(Row(_title(mine[0], chosen), cells, note=_notes(mine)))
            if mine[0].label not in told:
                beside = _published_by_step(mine, steps, bool(guidance))
                rows += beside
                told |= {mine[0].label} if beside else set()
        if told and not guidance:
            rows += _others_by_step(told, steps)
        columns = {str(step): f"{step:,}" for step in steps}
        title = f"{_name(metric)} by training iterations" + (f", {guidance}" if guidance else "")
        best = dict.fromkeys(columns, metric in RISING)
        found.append(Table(title, _about(results), columns, rows, best))
    return found


def systems(results: Sequence[Result]) -> list[Table]:
    """All scores of every model and checkpoint, with and without guidance apart, each above what was published for it
    (Table 2); guided ones with the other systems of that table. Of images of unknown origin nobody knows which."""
    found = []
    for guided, heading in ((True, "All scores, guided"), (False, "All scores"), (None, "Images of unknown origin")):
        chosen = [result for result in results if (bool(result.guidance) if result.origin else None) == guided]
        if not chosen:
            continue
        metrics = [key for key in NAMES if any(key in result.metrics for result in chosen)]
        metrics += sorted({key for result in chosen for key in result.metrics if _is_metric(key)} - set(metrics))
        metrics.sort(key=lambda key: not key.startswith(("fid", "fd_")))
        columns = {key: _name(key) for key in metrics}
        columns |= {"step": "iterations", "epochs": "epochs", "parameters": "parameters"}
        columns |= {"guidance": "guidance", "weak": "weak model"} if guided else {}
        columns |= {"evaluations": "evaluations"}
        rows, told = [], set[tuple[str, int]]()
        for mine in _experiments(chosen):
            for step in sorted({result.step or 0 for result in mine}):
                here = [result for result in mine if (result.step or 0) == step]
                rows.append(_own_row(here, chosen, metrics))
                match = _counterpart(here[0])
                if match is not None and (here[0].label, step) not in told:
                    told.add((here[0].label, step))
                    rows.append(_published_row(here[0].label, match))
        if guided and told:
            rows += _other_systems(told)
        best = {key: key.startswith(RISING) for key in metrics}
        found.append(Table(heading, _about(chosen), columns, rows, best))
    return found


def _own_row(results: Sequence[Result], among: Sequence[Result], metrics: Sequence[str]) -> Row:
    first, cells = results[0].origin, dict[str, Score | str]()
    for key in metrics:
        if values := [result.metrics[key] for result in results if key in result.metrics]:
            cells[key] = Score(tuple(values))
    cells["step"] = f"{first['step']:,}" if first.get("step") else ""
    recipe = RECIPES[results[0].label]() if results[0].label in RECIPES else None
    if recipe and first.get("step") and first.get("batch_size"):
        cells["epochs"] = f"{first['step'] * first['batch_size'] / recipe.epoch_images:.0f}"
    cells["parameters"] = f"{first['parameters'] / 1e6:.1f}M" if first.get("parameters") else ""
    cells["guidance"] = results[0].guidance
    weak = (first.get("guidance") or {}).get("weak") or {}
    name = weak.get("recipe") or weak.get("run")
    cells["weak"] = "" if not name else f"{name}@{weak['step']}" if weak.get("step") else str(name)
    used = [r.origin["evaluations"] for r in results if r.origin.get("evaluations")]
    cells["evaluations"] = f"{statistics.fmean(used):.0f}" if used else ""
    return Row(_title(results[0], among), cells, note=_notes(results))


def encoders(results: Sequence[Result]) -> list[Table]:
    """By semantic encoder and schedule at equal iterations (Table 3); none where one encoder made everything."""
    metric = leading(results)
    chosen = [r for r in results if not r.guidance and _encoder(r) and metric in r.metrics]
    if len({_encoder(result) for result in chosen}) < 2:
        return []
    # What else sets two results apart may not be what a row compares.
    rest = ("batch_size", "parameters")
    rows, kinds = list[Row](), list[str]()
    for (encoder, *_), mine in _by(
        chosen,
        lambda r: (_encoder(r), r.step or 0, r.sampler, tuple(r.origin.get(k) for k in rest), tuple(r.deviations)),
    ):
        by_kind: dict[str, list[list[Result]]] = defaultdict(list)
        for same in _experiments(mine):
            by_kind[_kind(same[0])].append(same)
        kinds += [kind for kind in by_kind if kind not in kinds]
        for number in range(max(map(len, by_kind.values()))):  # two lambda, say: a row each, never one mean
            cells: dict[str, Score | str] = {}
            apart = list[str]()
            for kind, groups in by_kind.items():
                if number < len(groups):
                    cells[kind] = Score(tuple(r.metrics[metric] for r in groups[number]))
                    apart += [_title(groups[number][0], mine)] if len(groups) > 1 else []
            step = f"{mine[0].step:,} iterations" if mine[0].step else ""
            rows.append(Row(" · ".join(filter(None, (encoder, step, *apart))), cells, note=_notes(mine)))
    if chosen[0].network == INCEPTION:
        for name, make in RECIPES.items():
            for row in make().published:
                if row.source.startswith("Table 3") or (name == "imagenet-sfd-xl" and _is_400k(row)):
                    kind = make().schedule
                    label = make().latents.split(", ")[1]
                    rows.append(Row(label, {kind: Score((row.fid,))}, "published", f"{name}: {row.source}"))
                    kinds += [kind] if kind not in kinds else []
    return [Table(f"{_name(metric)} by semantic encoder", _about(results), {kind: kind for kind in kinds}, rows)]


def leading(results: Sequence[Result]) -> str:
    """The metric that tables of one number take: the first distance of the first result."""
    metrics = list(results[0].metrics)
    return next((key for key in metrics if key.startswith(("fid", "fd_judge", "fd_"))), metrics[0])


def experiment_titles(results: Sequence[Result]) -> list[tuple[str, list[Result]]]:
    """Every experiment among `results` with what its row is called."""
    return [(_title(mine[0], results), mine) for mine in _experiments(results)]


def published_curve(label: str, *, guided: bool) -> list[Published]:
    """What was published for checkpoints of the recipe `label`, by iterations."""
    if label not in RECIPES:
        return []
    rows = [row for row in RECIPES[label]().published if (row.guidance is not None) == guided]
    return sorted(rows, key=lambda row: row.iterations)


def _published_by_step(mine: Sequence[Result], steps: Sequence[int], guided: bool) -> list[Row]:
    if not on_its_recipe(mine[0]):
        return []
    rows = [row for row in published_curve(mine[0].label, guided=guided) if row.iterations in steps]
    if not rows:
        return []
    cells: dict[str, Score | str] = {str(row.iterations): Score((row.fid,)) for row in rows}
    return [Row(mine[0].label, cells, "published", ", ".join(dict.fromkeys(row.source for row in rows)))]


def _others_by_step(told: set[str], steps: Sequence[int]) -> list[Row]:
    """The models of Table 1 that none of the results is of, at the same iterations."""
    curves = {name: published_curve(name, guided=False) for name in RECIPES}
    shown = [row for name in told for row in curves[name]]
    rest = {name: [row for row in rows if row not in shown] for name, rows in curves.items()} | OTHER_CONVERGENCE
    rows, seen = list[Row](), set[tuple[Published, ...]]()
    for name, published in rest.items():
        at = tuple(row for row in published if row.iterations in steps and row.source == "Table 1")
        if at and at not in seen:
            seen.add(at)
            rows.append(Row(name, {str(row.iterations): Score((row.fid,)) for row in at}, "published", "Table 1"))
    return rows


def on_its_recipe(result: Result) -> bool:
    """Whether numbers published for the recipe are of what was done here: by Inception, on the recipe's schedule."""
    if result.network != INCEPTION or result.label not in RECIPES:
        return False
    return not result.schedule or _kind(result) == RECIPES[result.label]().schedule


def _counterpart(result: Result) -> Published | None:
    """The published row of the same recipe and iterations, with AutoGuidance where there is AutoGuidance here."""
    about = result.origin.get("guidance")
    if not on_its_recipe(result) or (about and about["kind"] != "autoguidance"):
        return None
    rows = published_curve(result.label, guided=bool(about))
    return next((row for row in rows if row.iterations == result.step), None)


def _published_row(label: str, row: Published) -> Row:
    recipe: Recipe = RECIPES[label]()
    cells = _metric_cells(row.fid, row.sfid, row.inception_score, row.precision, row.recall)
    cells["step"] = f"{row.iterations:,}"
    cells["epochs"] = f"{row.iterations * recipe.train.batch_size / recipe.epoch_images:.0f}"
    cells["guidance"] = "" if row.guidance is None else f"AutoGuidance {row.guidance:g}"
    cells["weak"] = row.weak or ""
    return Row(recipe.name, cells, "published", row.source)


def _other_systems(told: set[tuple[str, int]]) -> list[Row]:
    """The rows of Table 2 that do not stand beside a result already."""
    rows, shown = list[Row](), {row for name, step in told for row in _guided(name) if row.iterations == step}
    for system in OTHER_SYSTEMS:
        cells = _metric_cells(system.fid, system.sfid, system.inception_score, system.precision, system.recall)
        cells |= {"epochs": str(system.epochs), "parameters": f"{system.parameters}M"}
        rows.append(Row(system.name, cells, "published", "Table 2"))
    for name in ("imagenet-sfd-xl", "imagenet-sfd-1b", "imagenet-xl-600ep"):
        rows += [_published_row(name, row) for row in _guided(name) if row not in shown]
    return rows


def _guided(name: str) -> list[Published]:
    return published_curve(name, guided=True)


def _metric_cells(*values: float | None) -> dict[str, Score | str]:
    keys = ("fid", "sfid", "inception_score", "precision", "recall")
    return {key: Score((value,)) for key, value in zip(keys, values, strict=True) if value is not None}


def _is_400k(row: Published) -> bool:
    return row.iterations == 400_000 and row.guidance is None


def _scores(results: Sequence[Result], metric: str) -> dict[int, Score]:
    by_step: dict[int, list[float]] = defaultdict(list)
    for result in results:
        if result.step is not None and metric in result.metrics:
            by_step[result.step].append(result.metrics[metric])
    return {step: Score(tuple(values)) for step, values in by_step.items()}


def _by(results: Iterable[Result], key: Any) -> list[tuple[tuple[Any, ...], list[Result]]]:
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[key(result)].append(result)
    return sorted(groups.items(), key=lambda item: (item[0][0], item[0][1], str(item[0][2:])))


def _experiments(results: Sequence[Result]) -> list[list[Result]]:
    """Results of one experiment together: all its seeds and iterations."""
    groups: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.experiment].append(result)
    return sorted(groups.values(), key=lambda group: (group[0].label, group[0].guidance, group[0].schedule))


def _title(result: Result, among: Sequence[Result]) -> str:
    """What a row is called: the model, its schedule, its solver, and its run where two others would be called alike."""

    def name(r: Result) -> str:
        return " · ".join(filter(None, (r.label, r.schedule, r.sampler)))

    same = [r for r in among if (r.guidance, r.deviations) == (result.guidance, result.deviations)]
    if len({r.experiment for r in same if name(r) == name(result)}) < 2:
        return name(result)
    batch, parameters = result.origin.get("batch_size"), result.origin.get("parameters")
    told = [f"batch {batch}" if batch else "", f"{parameters / 1e6:.1f}M" if parameters else "", _encoder(result)]
    return " · ".join(filter(None, (name(result), *told)))


def _kind(result: Result) -> str:
    """``"learned"``, or the fixed schedule, as recipes write it."""
    return "learned" if result.schedule.startswith("learned") else result.schedule


def _is_metric(key: str) -> bool:
    return key in NAMES or key.startswith(("fd_", "sfd_", "inception_score_"))


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
