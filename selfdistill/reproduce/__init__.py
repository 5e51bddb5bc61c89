"""The paper's question in miniature: a plan of runs, worker processes, tables and plots."""

from selfdistill.reproduce.run import reproduce

__all__ = ["reproduce"]
