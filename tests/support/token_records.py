"""Scored attempts without a model."""

from __future__ import annotations

from selfdistill.analysis.tokens import TokenAnalysis


def record(
    advantage: list[float],
    wrong: tuple[int, int] | None,
    kl: list[float] | None = None,
    *,
    problem: str = "p",
    context: str = "",
) -> TokenAnalysis:
    """Return a wrong attempt of which only the scores matter."""
    zeros = [0.0] * len(advantage)
    return TokenAnalysis(
        problem_id=problem,
        question="",
        answer="",
        reference="",
        response="",
        context=context,
        correct=False,
        first_wrong_step=None if wrong is None else 1 + (wrong[0] > 0),
        wrong_tokens=wrong,
        tokens=[""] * len(advantage),
        advantage=advantage,
        kl=kl or zeros,
        entropy=zeros,
        student_logprob=zeros,
        teacher_logprob=zeros,
    )
