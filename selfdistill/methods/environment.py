"""Environment feedback: the teacher sees what the task's checker says about this attempt."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.methods.loss import Loss
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import FeedbackDetail, FeedbackTask, Problem, Task, Verdict


class Environment:
    """The checker's verdict on each rollout in words; no solution is shown.

    Args:
        task: gives the feedback, if it has a way of its own to say it (`FeedbackTask`).
        detail: "answer" tells whether the final answer is right, "step" also the first wrong step.
        group_size: rollouts drawn for each prompt.
        loss: what is minimised on the completion tokens.
    """

    name = "environment"
    needs_context = True

    def __init__(self, *, task: Task, detail: FeedbackDetail, group_size: int, loss: Loss) -> None:
        self.task = task
        self.detail = detail
        self.group_size = group_size
        self.loss = loss

    def contexts(self, attempts: Sequence[Attempts]) -> list[list[TeacherContext | None]]:
        """Return the feedback on every rollout; None where the task has nothing to say."""
        return [
            [
                self._context(attempt.problem, rollout.text, verdict)
                for rollout, verdict in zip(attempt.rollouts, attempt.verdicts, strict=True)
            ]
            for attempt in attempts
        ]

    def _context(self, problem: Problem, response: str, verdict: Verdict) -> TeacherContext | None:
        if isinstance(self.task, FeedbackTask):
            text = self.task.feedback(problem, response, verdict, detail=self.detail)
        else:
            text = plain_feedback(verdict, detail=self.detail)
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
