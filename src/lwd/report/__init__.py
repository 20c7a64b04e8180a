"""The page of a demo: one self-contained HTML file made from the files of a run."""

from lwd.report.page import write_report

__all__ = ["write_report"]
