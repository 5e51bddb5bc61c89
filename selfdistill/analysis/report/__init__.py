"""One self-contained HTML page about a run: where the model erred and what the critique changed."""

from selfdistill.analysis.report.page import write_report

__all__ = ["write_report"]
