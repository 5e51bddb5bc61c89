"""Multi-step arithmetic with an exact checker, dialects, and a corpus for its solver."""

from selfdistill.tasks.arithmetic.task import ArithmeticTask

__all__ = ["ArithmeticTask"]
