"""RefSol: the teacher sees the complete reference solution, whatever the attempt was."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.config import RefSolMethod
from selfdistill.methods.distillation import distillation_method
from selfdistill.methods.method import Contexts, Method
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import Task


def refsol(settings: RefSolMethod, task: Task) -> Method:
    """Build reference-solution feedback (arXiv 2606.11173)."""
    return distillation_method(settings, task, references)


def references(attempts: Sequence[Attempts]) -> Contexts:
    """Return the problem's reference, once for every rollout."""
    return [
        [TeacherContext("reference", attempt.problem.reference)] * len(attempt.rollouts)
        for attempt in attempts
    ]
