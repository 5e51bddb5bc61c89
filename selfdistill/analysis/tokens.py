"""Where the self-teacher disagrees: the per-token advantage of attempts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from selfdistill.methods.method import Method
from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import score
from selfdistill.model.teacher import Teacher
from selfdistill.rollout.attempts import Attempts
from selfdistill.rollout.engine import completion_text
from selfdistill.rollout.spans import token_span
from selfdistill.tasks.interface import SteppedTask
from selfdistill.training.batch import render_groups
from selfdistill.training.solver import Solver

Place: TypeAlias = tuple[int, int]
"""A rollout: the place of its group among the attempts, and its own place within the group."""


@dataclass(frozen=True)
class TokenAnalysis:
    """One attempt, token by token; the lists have one entry per completion token.

    Attributes:
        problem_id, question, answer, reference: of the problem.
        response: the attempt as text.
        context: what the teacher saw beside the question (StepAlignFB: the critique).
        correct: whether the final answer is right.
        first_wrong_step: 1-based number of the earliest wrong step, or None.
        wrong_tokens: its tokens as a half-open range (start, stop), or None.
        tokens: each token as text, special tokens included.
        advantage: log p_teacher(y) - log p_student(y), in nats.
        kl: the divergence of the method's objective, in nats.
        entropy: of the student's next-token distribution, in nats.
        student_logprob, teacher_logprob: of the sampled token, in nats.
        steps_judged: whether the task's checker judges steps, so that those without a mark are
            right; False where older files did not record it.
    """

    problem_id: str
    question: str
    answer: str
    reference: str
    response: str
    context: str
    correct: bool
    first_wrong_step: int | None
    wrong_tokens: tuple[int, int] | None
    tokens: list[str]
    advantage: list[float]
    kl: list[float]
    entropy: list[float]
    student_logprob: list[float]
    teacher_logprob: list[float]
    steps_judged: bool = False


@torch.no_grad()
def analyze(
    solver: Solver,
    teacher: Teacher,
    method: Method,
    attempts: Sequence[Attempts],
    chosen: Sequence[Place],
    *,
    lm_heads: tuple[LMHead, LMHead],
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> list[TokenAnalysis]:
    """Score attempts with student and teacher, as training does.

    Args:
        solver: the student, which need not have written the attempts.
        teacher: the teacher strategy.
        method: decides what the teacher sees.
        attempts: whole groups, because what the teacher sees may come from the rest of the group.
        chosen: which of their rollouts to score.
        lm_heads: of the student and of the teacher.
        batch_size: rollouts scored at once.
        progress: called with the number of rollouts just scored.

    Returns:
        One record for each chosen rollout, in that order.
    """
    # What the teacher sees may come from the rest of a group, so whole groups are asked for it.
    groups = sorted({group for group, _ in chosen})
    contexts = dict(zip(groups, method.contexts([attempts[i] for i in groups]), strict=True))
    records: list[TokenAnalysis] = []
    for start in range(0, len(chosen), batch_size):
        batch = [
            (
                Attempts(attempts[i].problem, [attempts[i].rollouts[j]], [attempts[i].verdicts[j]]),
                contexts[i][j],
            )
            for i, j in chosen[start : start + batch_size]
        ]
        # Each chosen rollout is scored as a group of its own: the others are not looked at.
        scored = score(
            solver.model,
            teacher,
            render_groups(solver, method, [alone for alone, _ in batch], [[c] for _, c in batch]),
            attention=solver.config.attention,
        )
        output = method.loss(scored, *lm_heads, normalizer=1.0)
        assert output.advantage is not None
        assert output.student_logprob is not None
        assert output.teacher_logprob is not None
        # From one row of tokens back to a list for each rollout.
        lengths = [len(alone.rollouts[0].token_ids) for alone, _ in batch]
        columns = [
            [part.tolist() for part in column.split(lengths)]
            for column in (
                output.advantage,
                output.divergence,
                output.entropy,
                output.student_logprob,
                output.teacher_logprob,
            )
        ]
        for i, (alone, context) in enumerate(batch):
            (rollout,), (verdict,) = alone.rollouts, alone.verdicts
            advantage, kl, entropy, student_logprob, teacher_logprob = (c[i] for c in columns)
            records.append(
                TokenAnalysis(
                    problem_id=alone.problem.id,
                    question=alone.problem.question,
                    answer=alone.problem.answer,
                    reference=alone.problem.reference,
                    response=rollout.text,
                    context=context.text if context else "",
                    correct=verdict.correct,
                    first_wrong_step=verdict.first_wrong_step,
                    wrong_tokens=token_span(solver.tokenizer, rollout, verdict.wrong_span),
                    tokens=[
                        completion_text(solver.tokenizer, [token]) for token in rollout.token_ids
                    ],
                    advantage=advantage,
                    kl=kl,
                    entropy=entropy,
                    student_logprob=student_logprob,
                    teacher_logprob=teacher_logprob,
                    steps_judged=isinstance(solver.task, SteppedTask),
                )
            )
        if progress is not None:
            progress(len(batch))
    return records


def erroneous_attempts(
    attempts: Sequence[Attempts], *, limit: int, each: int | None = None, located: bool = False
) -> list[Place]:
    """Pick attempts that went wrong: with a wrong step, or cut off, or with a wrong answer.

    Args:
        attempts: groups of rollouts with verdicts.
        limit: how many to pick at most.
        each: how many of one problem at most; None: all.
        located: only those whose first wrong step the checker has marked.
    """
    picked: list[Place] = []
    for i, group in enumerate(attempts):
        wrong = [
            (i, j)
            for j, verdict in enumerate(group.verdicts)
            if verdict.wrong_span is not None or not (verdict.correct or located)
        ]
        picked += wrong[:each]
    return picked[:limit]
