"""Scored attempts without a model."""

from __future__ import annotations

import math
from dataclasses import replace

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


def make_record(**changes: object) -> TokenAnalysis:
    """Two steps and an answer; the second step is wrong at its last token."""
    text = "<step_1> 2 5 plus 9 makes 3 4 <step_2> 3 4 plus 8 makes 3 2 <answer> 3 2 <eos>"
    tokens = text.split()
    advantage = [0.0] * len(tokens)
    advantage[1], advantage[14] = 0.7, -3.25
    record = TokenAnalysis(
        problem_id="p1",
        question="25 + 9 + 8 mod 100",
        answer="42",
        reference="<step_1> from 25 add 9 get 34 <step_2> from 34 add 8 get 42 <answer> 42",
        response="<step_1> 25 plus 9 makes 34 <step_2> 34 plus 8 makes 32 <answer> 32",
        context="<step_1> 25 plus 9 makes 34 <step_2> 34 plus 8 makes 42 <answer> 42",
        correct=False,
        first_wrong_step=2,
        wrong_tokens=(8, 16),
        tokens=tokens,
        advantage=advantage,
        kl=[0.001 * i for i in range(len(tokens))],
        entropy=[0.1] * len(tokens),
        student_logprob=[math.log(0.64)] * len(tokens),
        teacher_logprob=[math.log(0.64) + a for a in advantage],
    )
    return replace(record, **changes)
