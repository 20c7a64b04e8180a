"""Pages made from the files of runs: of one demo, and of any runs beside each other."""

from lwd.report.comparison_page import write_comparison
from lwd.report.page import write_report

__all__ = ["write_comparison", "write_report"]
