"""Environment feedback: the teacher sees what the task's checker says about this attempt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from selfdistill.config import EnvironmentMethod
from selfdistill.methods.distillation import distillation_method
from selfdistill.methods.method import Contexts, Method
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import FeedbackDetail, FeedbackTask, Problem, Task, Verdict


def environment(settings: EnvironmentMethod, task: Task) -> Method:
    """Build feedback by the checker's verdict on each rollout in words; no solution is shown."""
    return distillation_method(settings, task, partial(feedback, task, detail=settings.detail))


def feedback(task: Task, attempts: Sequence[Attempts], *, detail: FeedbackDetail) -> Contexts:
    """Return the feedback on every rollout; None where the task has nothing to say.

    Args:
        task: gives the feedback in words of its own, if it has such (`FeedbackTask`).
        attempts: judged rollouts.
        detail: "answer" tells whether the final answer is right, "step" also the first wrong step.
    """
    return [
        [
            _context(task, attempt.problem, rollout.text, verdict, detail)
            for rollout, verdict in zip(attempt.rollouts, attempt.verdicts, strict=True)
        ]
        for attempt in attempts
    ]


def _context(
    task: Task, problem: Problem, response: str, verdict: Verdict, detail: FeedbackDetail
) -> TeacherContext | None:
    if isinstance(task, FeedbackTask):
        text = task.feedback(problem, response, verdict, detail=detail)
    else:
        text = plain_feedback(verdict, detail=detail)
    return TeacherContext("feedback", text) if text.strip() else None


def plain_feedback(verdict: Verdict, *, detail: FeedbackDetail) -> str:
    """Put a verdict into English, for tasks that have no words of their own."""
    sentences = []
    if detail == "step" and verdict.first_wrong_step is not None:
        sentences.append(f"Step {verdict.first_wrong_step} is wrong.")
    if verdict.answer is None:
        sentences.append("There is no final answer.")
    else:
        sentences.append(
            f"The answer {verdict.answer} is {'right' if verdict.correct else 'wrong'}."
        )
    return " ".join(sentences)
