"""The page itself: one self-contained HTML file, without scripts, that opens from disk."""

from __future__ import annotations

from html import escape
from pathlib import Path

from lwd.files import write_text
from lwd.report import sections, tables
from lwd.report.read import DemoFiles, read_demo
from lwd.report.style import stylesheet
from lwd.report.words import summary


def write_report(directory: Path | str) -> Path:
    """Write ``report.html`` into the directory of a demo and return its path.

    What a partial run lacks is left out of the page.

    Raises:
        FileNotFoundError: there is no demo in `directory`.
        ValueError: one of its files is damaged; the message names it.
        ImportError: matplotlib is missing (extra ``demo``).
        OSError: the page cannot be written; an older one is untouched.
    """
    directory = Path(directory)
    return write_text(directory / "report.html", render(read_demo(directory)))


def render(files: DemoFiles) -> str:
    """The page as HTML."""
    bodies = [
        ("sweep", "How the schedule was found", sections.sweep(files)),
        ("curves", "The learned curve and the fixed ones", sections.curves(files)),
        ("samples", "What the models draw", sections.samples(files)),
        ("trajectory", "One image on its way", sections.trajectory(files)),
        ("quality", "Quality during training, and with fewer evaluations", sections.quality(files)),
        ("results", "All results", sections.results(files)),
        ("training", "Training", sections.training(files)),
        ("run", "What was run", sections.run(files)),
    ]
    shown = [(name, heading, body) for name, heading, body in bodies if body]
    contents = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in shown)
    content = "".join(f'<section id="{name}"><h2>{heading}</h2>\n{body}</section>\n' for name, heading, body in shown)
    paragraphs = "".join(f"<p>{escape(paragraph)}</p>\n" for paragraph in summary(files))
    data = files.settings.get("data", {}).get("name")
    where = " · ".join(filter(None, ["Report of a demo run", data, str(files.config.get("started", ""))[:10]]))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Learning when to denoise: report</title>\n<style>\n{stylesheet()}</style></head>\n<body><main>\n"
        f'<header><h1>Learning when to denoise</h1>\n<p class="where">{escape(where)}</p>\n'
        f'<div class="summary">{paragraphs}</div>\n{tables.key_table(files)}\n<nav>{contents}</nav></header>\n'
        f"{content}</main></body></html>\n"
    )
