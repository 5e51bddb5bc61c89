"""RefSol: the teacher sees the complete reference solution, whatever the attempt was."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.config import ConfigError, RefSolMethod
from selfdistill.methods.distillation import distillation_method
from selfdistill.methods.method import Contexts, Method
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import Task


def refsol(settings: RefSolMethod, task: Task) -> Method:
    """Build reference-solution feedback (arXiv 2606.11173).

    Raises:
        ConfigError: a training problem has no reference solution.
    """
    method = distillation_method(settings, task, references)
    problems = task.problems(split="train", count=task.size("train") or 0)
    without = next((problem for problem in problems if not problem.reference.strip()), None)
    if without is not None:
        raise ConfigError(
            f"method refsol shows the teacher reference solutions, and problem {without.id!r} of "
            f"the {task.name} task has none: give it one, or choose another method"
        )
    return method


def references(attempts: Sequence[Attempts]) -> Contexts:
    """Return the problem's reference, once for every rollout."""
    return [
        [TeacherContext("reference", attempt.problem.reference)] * len(attempt.rollouts)
        for attempt in attempts
    ]
