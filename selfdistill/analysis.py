"""Where the self-teacher disagrees: the per-token advantage of attempts, and how local it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from selfdistill.evaluate import Attempts
from selfdistill.methods import Method
from selfdistill.methods.loss import Head
from selfdistill.rollout import Rollout
from selfdistill.scoring import score
from selfdistill.solver import Solver
from selfdistill.tasks import Problem, Verdict
from selfdistill.teacher import Teacher
from selfdistill.train import render_groups

# A token counts as negative when the teacher finds it less likely by more than this (nats).
NEGATIVE = -0.1


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


@dataclass(frozen=True)
class Localisation:
    """How the advantage lies around the first wrong step, over attempts that have one.

    Attributes:
        attempts: how many attempts were looked at.
        mean_before, mean_at, mean_after: mean advantage of the tokens before, in and after the
            first wrong step (nats); None when there are no such tokens.
        lowest_at: mean over attempts of the lowest advantage within the wrong step.
        share_at: share of the sum of |A| that lies on the wrong step.
        negative_before: share of the tokens before the wrong step with A < -0.1.
        kl_share_at: share of the divergence that lies on the wrong step.
    """

    attempts: int
    mean_before: float | None
    mean_at: float | None
    mean_after: float | None
    lowest_at: float | None
    share_at: float | None
    negative_before: float | None
    kl_share_at: float | None


@torch.no_grad()
def analyze(
    solver: Solver,
    teacher: Teacher,
    method: Method,
    attempts: Sequence[tuple[Problem, Rollout, Verdict]],
    *,
    heads: tuple[Head, Head],
    batch_size: int = 16,
) -> list[TokenAnalysis]:
    """Score attempts with student and teacher, as training does.

    Args:
        solver: the student, which need not have written the attempts.
        teacher: the teacher strategy.
        method: decides what the teacher sees.
        attempts: what to look at, with the checker's verdicts.
        heads: of the student and of the teacher.
        batch_size: attempts scored at once.
    """
    records: list[TokenAnalysis] = []
    for start in range(0, len(attempts), batch_size):
        batch = attempts[start : start + batch_size]
        alone = [Attempts(problem, [rollout], [verdict]) for problem, rollout, verdict in batch]
        contexts = method.contexts(alone)
        groups = render_groups(solver, alone, contexts)
        scored = score(solver.model, teacher, groups)
        output = method.loss(scored, *heads, normalizer=1.0)
        assert output.advantage is not None
        assert output.student_logprob is not None
        assert output.teacher_logprob is not None
        lengths = [len(rollout.token_ids) for _, rollout, _ in batch]
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
        for i, (problem, rollout, verdict) in enumerate(batch):
            advantage, kl, entropy, student_logprob, teacher_logprob = (c[i] for c in columns)
            records.append(
                TokenAnalysis(
                    problem_id=problem.id,
                    question=problem.question,
                    answer=problem.answer,
                    reference=problem.reference,
                    response=rollout.text,
                    context=context.text if (context := contexts[i][0]) else "",
                    correct=verdict.correct,
                    first_wrong_step=verdict.first_wrong_step,
                    wrong_tokens=token_span(solver.tokenizer, rollout, verdict.wrong_span),
                    tokens=[solver.tokenizer.decode([token]) for token in rollout.token_ids],
                    advantage=advantage,
                    kl=kl,
                    entropy=entropy,
                    student_logprob=student_logprob,
                    teacher_logprob=teacher_logprob,
                )
            )
    return records


def erroneous_attempts(
    attempts: Sequence[Attempts], *, limit: int
) -> list[tuple[Problem, Rollout, Verdict]]:
    """Pick the first attempt with a wrong step of each problem, `limit` problems at most."""
    picked = []
    for attempt in attempts:
        for rollout, verdict in zip(attempt.rollouts, attempt.verdicts, strict=True):
            if verdict.wrong_span is not None:
                picked.append((attempt.problem, rollout, verdict))
                break
    return picked[:limit]


def token_span(
    tokenizer: PreTrainedTokenizerBase, rollout: Rollout, span: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the completion tokens (start, stop) that overlap a character span of its text."""
    if span is None:
        return None
    # The text grows token by token, so the length of each beginning is where the next one starts.
    ends = [
        len(tokenizer.decode(rollout.token_ids[: i + 1], skip_special_tokens=True))
        for i in range(len(rollout.token_ids))
    ]
    begins = [0, *ends[:-1]]
    inside = [
        i
        for i, (begin, end) in enumerate(zip(begins, ends, strict=True))
        if end > span[0] and begin < span[1]
    ]
    return (inside[0], inside[-1] + 1) if inside else None


def localise(records: Sequence[TokenAnalysis]) -> Localisation:
    """Aggregate the attempts that have a wrong step."""
    before: list[float] = []
    at: list[float] = []
    after: list[float] = []
    lowest: list[float] = []
    kl_at = kl_all = 0.0
    count = 0
    for record in records:
        if record.wrong_tokens is None:
            continue
        count += 1
        start, stop = record.wrong_tokens
        before += record.advantage[:start]
        at += record.advantage[start:stop]
        after += record.advantage[stop:]
        lowest.append(min(record.advantage[start:stop]))
        kl_at += sum(record.kl[start:stop])
        kl_all += sum(record.kl)
    size = sum(map(abs, [*before, *at, *after]))
    return Localisation(
        attempts=count,
        mean_before=_mean(before),
        mean_at=_mean(at),
        mean_after=_mean(after),
        lowest_at=_mean(lowest),
        share_at=sum(map(abs, at)) / size if size else None,
        negative_before=_mean([float(a < NEGATIVE) for a in before]),
        kl_share_at=kl_at / kl_all if kl_all else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
