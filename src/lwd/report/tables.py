"""The tables of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from lwd.report.read import DemoFiles
from lwd.report.style import variable
from lwd.report.words import decimals, number, percent, span, title


class Column(NamedTuple):
    """A column of scores; `best` picks the value to print bold."""

    heading: str
    key: str
    form: str  # "distance", "share" or "percent"
    best: Any


EMBEDDED = Column("feature distance,<br>embedded network", "fd_embedded", "distance", min)
JUDGE = Column("feature distance,<br>independent judge", "fd_judge", "distance", min)
PRECISION = Column("precision", "precision", "share", max)
RECALL = Column("recall", "recall", "share", max)
ACCURACY = Column("class<br>accuracy", "accuracy", "percent", max)


def key_table(files: DemoFiles) -> str:
    """The arms with both distances as bars."""
    return _scores(files, [EMBEDDED, JUDGE, ACCURACY], bars=True) if files.arms else ""


def results_table(files: DemoFiles) -> str:
    """Every score of every arm, and what it cost."""

    def cost(arm: Mapping[str, Any]) -> list[str]:
        final = arm["final"]
        return [
            f"{number(final['evaluations'], 0)}",
            f"{arm['steps']:,}",
            span(arm["train_seconds"]) if arm.get("train_seconds") else "–",
        ]

    return _scores(
        files,
        [EMBEDDED, JUDGE, PRECISION, RECALL, ACCURACY],
        more=(["model<br>evaluations", "training<br>steps", "training<br>time"], cost),
    )


def _scores(files: DemoFiles, columns: Sequence[Column], *, bars: bool = False, more: Any = None) -> str:
    finals = {name: arm["final"] for name, arm in files.arms.items()}
    floor = files.results.get("floor")
    printed = {column.key: _printed(column, finals, floor) for column in columns}
    longest = {column.key: max(final[column.key] for final in finals.values()) or 1.0 for column in columns}
    barred = {column.key for column in columns if bars and column.form == "distance"}

    def cell(column: Column, name: str, value: float) -> str:
        text = printed[column.key][name]
        best = column.best(final[column.key] for final in finals.values())
        if name in finals and text == printed[column.key][next(n for n in finals if finals[n][column.key] == best)]:
            text = f"<b>{text}</b>"
        if column.key not in barred:
            return f"<td>{text}</td>"
        part = f"{100 * value / longest[column.key]:.1f}%"
        colour = variable(name) if name in finals else "var(--muted)"
        return (
            f'<td class="bars"><div class="bar" style="--swatch:{colour};--part:{part}">'
            f"<span>{text}</span><i></i></div></td>"
        )

    extra_heads, extra = more if more else ([], lambda arm: [])
    heads = "".join(f"<th{_bars(column.key in barred)}>{column.heading}</th>" for column in columns)
    heads += "".join(f"<th>{head}</th>" for head in extra_heads)
    rows = ""
    for name, arm in files.arms.items():
        cells = "".join(cell(column, name, finals[name][column.key]) for column in columns)
        cells += "".join(f"<td>{text}</td>" for text in extra(arm))
        rows += f"<tr>{_row_head(title(files, name), variable(name))}{cells}</tr>\n"
    if floor:
        cells = "".join(cell(column, "", floor[column.key]) for column in columns) + "<td></td>" * len(extra_heads)
        rows += f'<tr class="real">{_row_head("real images", None)}{cells}</tr>\n'
    return (
        f'<div class="scroll"><table class="wide"><thead><tr><th></th>{heads}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _bars(yes: bool) -> str:
    return ' class="bars"' if yes else ""


def _row_head(text: str, colour: str | None) -> str:
    swatch = f'style="--swatch:{colour}"' if colour else ""
    return f'<th class="arm"><span class="swatch{"" if colour else " none"}" {swatch}></span>{escape(text)}</th>'


def _printed(column: Column, finals: Mapping[str, Any], floor: Mapping[str, Any] | None) -> dict[str, str]:
    """The text of every arm's value, and under "" that of the real images."""
    values = {name: final[column.key] for name, final in finals.items()}
    places = decimals(list(values.values()))
    if floor:
        values[""] = floor[column.key]
    if column.form == "distance":
        return {name: number(value, places) for name, value in values.items()}
    return {name: percent(value) if column.form == "percent" else f"{value:.2f}" for name, value in values.items()}


def facts(rows: Mapping[str, Any]) -> str:
    """Names and values, in two columns; empty values are left out."""
    lines = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{_plain(value)}</td></tr>\n"
        for name, value in rows.items()
        if value not in (None, "")
    )
    return f'<table class="facts"><tbody>{lines}</tbody></table>'


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{escape(str(name))} {_plain(item)}" for name, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return "none" if value is None else escape(str(value))


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, with dots in the names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = "none" if value is None else value
    return flat
