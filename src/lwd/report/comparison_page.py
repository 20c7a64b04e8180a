"""The page that compares any runs: HTML that opens from disk, and the same tables as Markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lwd.files import sha256_of, write_json, write_text
from lwd.report import figures
from lwd.report.collect import Collected, Result, Run, collect
from lwd.report.comparison import Table, experiment_titles, leading, on_its_recipe, published_curve, tables
from lwd.report.sample_pages import sample_sections
from lwd.report.sections import figure, legend
from lwd.report.style import COLOURS, stylesheet

INKS = ("learned", "offset", "synchronous", "autoguidance", "weak", "ink")
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)))


def write_comparison(paths: Sequence[Path | str], out: Path | str) -> Path:
    """Write the page `out`, and its tables beside it as ``.md`` and ``.json``; returns `out`.

    Args:
        paths: files and directories to search, see `lwd.report.collect.collect`.

    Raises:
        FileNotFoundError, ValueError: as `collect`.
        ImportError: matplotlib or Pillow is missing; names the extra.
    """
    out, found = Path(out), collect(paths)
    compared = tables(found.results)
    write_json(out.with_suffix(".json"), {"format": "lwd-report/1", "tables": [table.to_dict() for table in compared]})
    write_text(out.with_suffix(".md"), "\n\n".join(markdown(table) for table in compared) + "\n")
    return write_text(out, page(found, compared))


def page(found: Collected, compared: Sequence[Table]) -> str:
    bodies = [
        ("scores", "Scores", "".join(map(html, compared))),
        ("convergence", "Convergence", _convergence(found.results)),
        ("sweeps", "Probes over lambda", "".join(_sweep(path, sweep) for path, sweep in found.sweeps.items())),
        ("schedules", "Schedules", _schedules(found)),
        ("training", "Training", _training(found.runs)),
        ("samples", "Samples by class", sample_sections(found.samples)),
        ("files", "What this was made of", _files(found)),
    ]
    shown = [(name, heading, body) for name, heading, body in bodies if body]
    contents = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in shown)
    content = "".join(f'<section id="{name}"><h2>{heading}</h2>\n{body}</section>\n' for name, heading, body in shown)
    counts = [(len(found.results), "evaluation"), (len(found.runs), "training run"), (len(found.sweeps), "sweep"),
              (len(found.samples), "set")]  # fmt: skip
    told = ", ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in counts if n)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>lwd: report on runs</title>\n<style>\n{stylesheet()}</style></head>\n<body><main>\n"
        f'<header><h1>Report on runs</h1>\n<p class="where">{escape(told)}</p>\n<nav>{contents}</nav></header>\n'
        f"{content}</main></body></html>\n"
    )


def html(table: Table) -> str:
    """A table with its notes below; published rows in grey."""
    notes = list(dict.fromkeys(row.note for row in table.rows if row.note and row.kind == "own"))
    heads = "".join(f"<th>{escape(heading)}</th>" for heading in table.columns.values())
    lines = ""
    for row in table.rows:
        cells = ""
        for key in table.columns:
            cell = row.cells.get(key, "")
            text = escape(cell if isinstance(cell, str) else cell.text())
            cells += f"<td>{f'<b>{text}</b>' if table.is_best(row, key) else text}</td>"
        mark = f"<sup>{notes.index(row.note) + 1}</sup>" if row.note in notes else ""
        label = f"{escape(row.label)}{mark}"
        if row.kind == "published":
            label = f"{escape(row.label)} <small>published, {escape(row.note)}</small>"
        lines += f"<tr{' class=real' if row.kind == 'published' else ''}><th>{label}</th>{cells}</tr>\n"
    below = "".join(
        f"<p><sup>{n}</sup> Not as ADM’s protocol asks: {escape(note)}.</p>" for n, note in enumerate(notes, 1)
    )
    return (
        f"<h3>{escape(table.title)}</h3>\n<p>{escape(table.about)}.</p>\n"
        f'<div class="scroll"><table class="wide"><thead><tr><th></th>{heads}</tr></thead>\n'
        f"<tbody>{lines}</tbody></table></div>\n{below}"
    )


def markdown(table: Table) -> str:
    notes = list(dict.fromkeys(row.note for row in table.rows if row.note and row.kind == "own"))
    lines = [f"### {table.title}", "", f"{table.about}.", "", f"| | {' | '.join(table.columns.values())} |"]
    lines.append("| --- |" + " --- |" * len(table.columns))
    for row in table.rows:
        cells = []
        for key in table.columns:
            cell = row.cells.get(key, "")
            text = cell if isinstance(cell, str) else cell.text()
            cells.append(f"**{text}**" if table.is_best(row, key) else text)
        note = f" ({notes.index(row.note) + 1})" if row.note in notes else ""
        label = f"*{row.label}, published ({row.note})*" if row.kind == "published" else f"{row.label}{note}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"({n}) Not as ADM's protocol asks: {note}." for n, note in enumerate(notes, 1))])


def _line(number: int) -> dict[str, Any]:
    """The style of the line `number` of a figure."""
    return {"color": COLOURS[INKS[number % len(INKS)]].light, "linestyle": DASHES[number // len(INKS) % len(DASHES)]}


def _legend(labels: Sequence[str]) -> str:
    dashed = ("", ";stroke-dasharray:9 4", ";stroke-dasharray:3 3")
    return legend(
        (f"stroke:var(--{INKS[i % len(INKS)]});stroke-width:3.5{dashed[i // len(INKS) % 3]}", escape(label))
        for i, label in enumerate(labels)
    )


def _convergence(results: Sequence[Result]) -> str:
    """The leading metric against iterations, for every set of comparable results with two steps or more; guided and
    unguided ones in panels of their own."""
    content = ""
    for setting in dict.fromkeys(result.comparable for result in results):
        group = [result for result in results if result.comparable == setting and result.step is not None]
        if not group:
            continue
        metric = leading(group)
        group = [result for result in group if metric in result.metrics]
        experiments = experiment_titles(group)
        if max((len({result.step for result in mine}) for _, mine in experiments), default=0) < 2:
            continue
        numbers = {id(mine): number for number, (_, mine) in enumerate(experiments)}
        names = [" · ".join(filter(None, (title, mine[0].guidance))) for title, mine in experiments]
        panels, dotted = list[str](), False
        for guided in (False, True):
            here = {numbers[id(mine)]: mine for _, mine in experiments if bool(mine[0].guidance) == guided}
            if not here:
                continue
            published = {
                number: rows
                for number, mine in here.items()
                if on_its_recipe(mine[0]) and (rows := published_curve(mine[0].label, guided=guided))
            }
            dotted = dotted or bool(published)
            title = f"{metric}, {'with' if guided else 'without'} guidance"

            def draw(axes: Any, here: Any = here, published: Any = published, metric: str = metric) -> None:
                values = _draw_convergence(axes, here, published, metric)
                figures._value_axis(axes, values)

            panels.append(figures.panel(draw, title, "training iterations", width=480, height=330))
        network, reference, _, images = setting
        caption = f"Features of {escape(network)}, reference {escape(reference)}, {images:,} images."
        caption += " Dotted, in the same colour: published for the same recipe." if dotted else ""
        if any(result.deviations for result in group):
            caption += " Hollow: not as ADM’s protocol asks, see the notes of the tables."
        content += figure(panels, caption, _legend(names), "panels" if len(panels) > 1 else "panels single")
    return content


def _draw_convergence(
    axes: Any, here: Mapping[int, Sequence[Result]], published: Mapping[int, Any], metric: str
) -> list[float]:
    """Draw our curves and the published ones; returns every value drawn."""
    values = list[float]()
    for number, rows in published.items():
        marker = "." if len(rows) == 1 else None
        colour = _line(number)["color"]
        axes.plot([r.iterations for r in rows], [r.fid for r in rows], color=colour, linestyle=":", marker=marker)
        values += [row.fid for row in rows]
    for number, mine in here.items():
        points: dict[int, list[float]] = {}
        for result in mine:
            points.setdefault(result.step or 0, []).append(result.metrics[metric])
        steps = sorted(points)
        means = [float(np.mean(points[step])) for step in steps]
        style = _line(number)
        hollow = {"markerfacecolor": figures.PAPER, "markeredgecolor": style["color"]} if mine[0].deviations else {}
        axes.plot(steps, means, marker="o", clip_on=False, zorder=3, **style, **hollow)
        values += [value for seeds in points.values() for value in seeds]
    return values


def _sweep(path: Path, sweep: Mapping[str, Any]) -> str:
    runs, picked = sweep["runs"], sweep["picked"]
    if not runs:
        return ""
    panels = [figures.sweep_curves(sweep), figures.sweep_convergence(sweep, None)]
    drawn = [figures.panel(panel.draw, panel.title, panel.xlabel) for panel in panels]
    entries = []
    for run, rank in zip(runs, figures.ranks(runs), strict=True):
        state = "picked" if run["kinetic"] == picked else "collapsed" if run["collapsed"] else ""
        mine = run["kinetic"] == picked
        stroke = (
            "var(--learned);stroke-width:4" if mine else f"var(--ink);stroke-width:2.2;opacity:{0.28 + 0.5 * rank:.2f}"
        )
        dashes = ";stroke-dasharray:6 3.5" if run["collapsed"] else ""
        entries.append((f"stroke:{stroke}{dashes}", f"λ = {run['kinetic']:g} <small>{state}</small>"))
    return figure(drawn, f"{escape(str(path))}. Dashed: collapsed to the extreme of the family.", legend(entries))


def _schedules(found: Collected) -> str:
    """Every distinct schedule of runs, sweeps and results in one figure, with its value in the middle."""
    curves: dict[str, Mapping[str, Any]] = {}

    def add(label: str, schedule: Mapping[str, Any]) -> None:
        same = (schedule["kind"], schedule["groups"], schedule["parameters"])
        path = len(schedule["groups"]) > 1 and schedule["kind"] != "independent"
        if path and same not in [(s["kind"], s["groups"], s["parameters"]) for s in curves.values()]:
            curves[label if label not in curves else f"{label} ({len(curves)})"] = schedule

    for run in found.runs:
        add(run.label, run.schedule)
    for path, sweep in found.sweeps.items():
        for probe in sweep["runs"]:
            if probe["kinetic"] == sweep["picked"]:
                add(f"{path.parent.name}, λ = {probe['kinetic']:g}", probe["schedule"])
    for result in found.results:
        if result.origin.get("schedule"):
            add(result.label, result.origin["schedule"])
    if not curves:
        return ""
    tau = np.linspace(0, 1, 201)

    def draw(axes: Any) -> None:
        for number, schedule in enumerate(curves.values()):
            t = figures.local_times(schedule, tau)
            axes.plot(t[:, -1], t[:, 0], clip_on=False, zorder=3, **_line(number))
        figures._unit_square(axes)

    drawn = figures.panel(draw, "local time of the first group", "local time of the last group")
    rows = "".join(
        f"<tr><th>{escape(label)}</th><td>{escape(schedule['kind'])}</td>"
        + "".join(f"<td>{value:.3f}</td>" for value in figures.local_times(schedule, np.array([0.5]))[0][[0, -1]])
        + "</tr>"
        for label, schedule in curves.items()
    )
    table = (
        '<table class="wide"><thead><tr><th></th><th>kind</th><th>first group at τ = 1/2</th>'
        f"<th>last group at τ = 1/2</th></tr></thead><tbody>{rows}</tbody></table>"
    )
    return (
        figure([drawn], "The paths through the square of local times.", _legend(list(curves)), "panels single") + table
    )


def _training(runs: Sequence[Run]) -> str:
    """The loss of every run, and the held-out one where it was measured."""
    shown = [run for run in runs if any("loss" in row for row in run.log)]
    if not shown:
        return ""
    labels = [run.label for run in shown]
    # Runs of several seeds often have the same name in folders of their own.
    labels = [
        f"{run.path.parent.name}/{own}" if labels.count(own) > 1 else own
        for run, own in zip(shown, labels, strict=True)
    ]
    drawn = []
    for key, title in (("flow", "flow loss"), ("validation", "held-out loss, information-weighted")):
        logs = [[row for row in run.log if key in row] for run in shown]
        if not any(logs):
            continue

        def draw(axes: Any, logs: Any = logs, key: str = key) -> None:
            settled: list[float] = []
            for number, rows in enumerate(logs):
                if not rows:
                    continue
                values = figures._thinned([row[key] for row in rows])
                axes.plot(figures._thinned([row["step"] for row in rows]), values, **_line(number) | {"linewidth": 1.8})
                settled += list(values[len(values) // 20 :])
            margin = 0.06 * (max(settled) - min(settled) or 1.0)
            axes.set_xlim(left=0)
            axes.set_ylim(min(settled) - margin, max(settled) + margin)

        drawn.append(figures.panel(draw, title, "training step"))
    caption = "The flow loss of different schedules is not comparable; the held-out loss is."
    kind = "panels" if len(drawn) > 1 else "panels single"
    return figure(drawn, caption, _legend(labels), kind)


def _files(found: Collected) -> str:
    """Every file with the beginning of its hash; machines and versions."""
    files = {result.source for result in found.results} | set(found.sweeps)
    files |= {path / "samples.json" for path in found.samples} | {run.path / "metrics.jsonl" for run in found.runs}
    rows = "".join(f"<tr><th>{escape(str(file))}</th><td>{sha256_of(file)[:12]}</td></tr>" for file in sorted(files))
    scored = [result.data for result in found.results if {"machine", "versions"} <= result.data.keys()]
    machines = dict.fromkeys(
        f"{data['machine']['processor']}, {data['machine']['device']}; torch {data['versions']['torch']}"
        for data in scored
    )
    told = "".join(f"<p>Scored on {escape(machine)}.</p>" for machine in machines)
    unused = ", ".join(escape(str(path)) for path in found.unused)
    rest = f"<p>Found, but not used: {unused}.</p>" if unused else ""
    return f'<table class="facts"><tbody>{rows}</tbody></table>{told}{rest}'
