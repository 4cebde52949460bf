"""The report of a run: one HTML file that stands alone."""

from farthing.report.page import write_report

__all__ = ["write_report"]
