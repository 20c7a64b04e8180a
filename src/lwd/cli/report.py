"""`lwd report`: tables and figures of any runs."""

from __future__ import annotations

from pathlib import Path


def report(paths: tuple[Path, ...], out: Path = Path("report.html")) -> None:
    """Tables and figures of any runs, beside the published numbers where a recipe has them.

    Convergence, all scores, semantic encoders, sweeps over lambda, schedules, losses and samples by class: whatever the
    files give. The tables are written as Markdown and JSON too. The directory of a demo by itself gives its own page.

    Args:
        paths: evaluations (`lwd evaluate --out`), directories of runs, sweeps and sets of samples, or directories that
            hold such.
        out: the page; tables go beside it, with the endings .md and .json.
    """
    from lwd.report import write_comparison, write_report

    if len(paths) == 1 and (paths[0] / "judge").is_dir() and (paths[0] / "config.json").is_file():
        print(write_report(paths[0]))
    else:
        print(write_comparison(paths, out))
