"""From judged rollouts to prompt groups: what a step learns from; what it leaves out is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from selfdistill.methods.method import Contexts, Method
from selfdistill.model.layout import PromptGroup
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.rollout.engine import Rollout
from selfdistill.rollout.spans import token_span, token_steps
from selfdistill.tasks.interface import Problem, StepTask, TaskError, Verdict
from selfdistill.training.distributed import ALONE, Ranks
from selfdistill.training.solver import Solver


@dataclass(frozen=True)
class Batch:
    """What a step learns from.

    Attributes:
        groups: tokens of questions, contexts and rollouts; empty when nothing was left.
        attempts: the rollouts of each group, whole.
        dropped: rollouts left out because the method has no context for them.
        too_long: rollouts left out because they do not fit (`prompt.too_long` is "drop").
    """

    groups: list[PromptGroup]
    attempts: list[Attempts]
    dropped: int
    too_long: int


def build_batch(
    solver: Solver,
    method: Method,
    attempts: Sequence[Attempts],
    contexts: Contexts,
    *,
    too_long: Literal["error", "drop"],
) -> Batch:
    """Choose the rollouts of a step and put them together as token ids.

    Args:
        solver: knows the prompts, how long they may be, and the task.
        method: says which rollouts teach something, and how far.
        attempts: judged rollouts.
        contexts: what the teacher sees with each of them.
        too_long: what happens to a rollout that does not fit, see `PromptConfig`.

    Raises:
        PromptTooLongError: a rollout does not fit, and `too_long` is "error".
    """
    with_context, contexts = leave_out(method, attempts, contexts)
    kept = with_context
    # Lengths are those before the cut, so that what fits does not depend on the loss.
    if too_long == "drop":
        kept, contexts = leave_out_long_rollouts(solver, method, with_context, contexts)
    cut = cut_rollouts(solver.tokenizer, kept) if method.stops_at_wrong_step else kept
    return Batch(
        render_groups(solver, method, cut, contexts),
        list(kept),
        dropped=count_rollouts(attempts) - count_rollouts(with_context),
        too_long=count_rollouts(with_context) - count_rollouts(kept),
    )


def context_kinds(contexts: Contexts) -> list[str]:
    """Return each rollout's kind of context, "none" for those without."""
    return ["none" if context is None else context.kind for group in contexts for context in group]


def leave_out_long_questions(
    solver: Solver, problems: Sequence[Problem], ranks: Ranks = ALONE
) -> list[Problem]:
    """Return the problems that leave room for a whole completion, the same ones on every rank.

    Args:
        solver: knows the prompts and how long they may be.
        problems: all of a step; every rank measures its share of them.
        ranks: the processes that share the step.

    Raises:
        TaskError: none does, so a step has nothing to train on.
    """
    room = solver.config.rollout.max_new_tokens
    share = ranks.share(len(problems))
    fits = ranks.gather(
        [
            solver.context.leaves_room(problem, max_new_tokens=room)
            for problem in problems[share.start : share.stop]
        ]
    )
    kept = [problem for problem, fit in zip(problems, fits, strict=True) if fit]
    if problems and not kept:
        raise TaskError(
            f"none of the {len(problems)} problems of a step leaves room for {room} new tokens, so "
            "all of them were left out (prompt.too_long: drop): raise prompt.max_length or "
            "prompts_per_step, or lower rollout.max_new_tokens"
        )
    return kept


def leave_out_long_rollouts(
    solver: Solver, method: Method, attempts: Sequence[Attempts], contexts: Contexts
) -> tuple[list[Attempts], Contexts]:
    """Return the rollouts that fit behind the student's prompt and behind the teacher's."""
    return keep_rollouts(
        attempts,
        contexts,
        lambda problem, context, rollout: solver.context.fits(
            problem, context if method.reads_context else None, rollout.token_ids
        ),
    )


def leave_out(
    method: Method, attempts: Sequence[Attempts], contexts: Contexts
) -> tuple[list[Attempts], Contexts]:
    """Return attempts and contexts without the rollouts that the method cannot learn from."""
    if not method.needs_context:
        return list(attempts), contexts
    return keep_rollouts(attempts, contexts, lambda problem, context, rollout: context is not None)


def keep_rollouts(
    attempts: Sequence[Attempts],
    contexts: Contexts,
    keep: Callable[[Problem, TeacherContext | None, Rollout], bool],
) -> tuple[list[Attempts], Contexts]:
    """Return the rollouts that `keep` wants, with their contexts.

    Prompts whose rollouts are all left out are left out, too: nothing may remain.
    """
    kept: list[Attempts] = []
    kept_contexts: Contexts = []
    for attempt, group in zip(attempts, contexts, strict=True):
        places = [
            i
            for i, (context, rollout) in enumerate(zip(group, attempt.rollouts, strict=True))
            if keep(attempt.problem, context, rollout)
        ]
        if places:
            rollouts = [attempt.rollouts[i] for i in places]
            verdicts = [attempt.verdicts[i] for i in places]
            kept.append(Attempts(attempt.problem, rollouts, verdicts))
            kept_contexts.append([group[i] for i in places])
    return kept, kept_contexts


def cut_rollouts(
    tokenizer: PreTrainedTokenizerBase, attempts: Sequence[Attempts]
) -> list[Attempts]:
    """Cut the tokens of each rollout behind its first wrong step."""

    def cut(rollout: Rollout, verdict: Verdict) -> Rollout:
        span = token_span(tokenizer, rollout, verdict.wrong_span)
        return rollout.first(None if span is None else span[1])

    return [
        replace(attempt, rollouts=list(map(cut, attempt.rollouts, attempt.verdicts)))
        for attempt in attempts
    ]


def rollout_steps(solver: Solver, rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Return the step of every token; see `PromptGroup.steps`."""
    task = solver.task
    assert isinstance(task, StepTask)  # `build_method` refuses the others
    return [
        token_steps(solver.tokenizer, rollout, task.step_spans(rollout.text))
        for rollout in rollouts
    ]


def wrong_tokens(solver: Solver, rollout: Rollout, context: TeacherContext | None) -> list[bool]:
    """Return whether each token belongs to the first wrong step; see `PromptGroup.wrong`."""
    span = token_span(solver.tokenizer, rollout, None if context is None else context.wrong_span)
    start, stop = span or (0, 0)
    return [start <= place < stop for place in range(len(rollout.token_ids))]


def count_rollouts(attempts: Sequence[Attempts]) -> int:
    """Return how many rollouts there are in all."""
    return sum(len(attempt.rollouts) for attempt in attempts)


def render_groups(
    solver: Solver, method: Method, attempts: Sequence[Attempts], contexts: Contexts
) -> list[PromptGroup]:
    """Put questions, contexts and judged rollouts together as token ids."""
    return [
        solver.context.prompt_group(
            attempt.problem,
            group_contexts if method.reads_context else [None] * len(group_contexts),
            [rollout.token_ids for rollout in attempt.rollouts],
            rewards=[verdict.reward for verdict in attempt.verdicts],
            old_logprobs=[rollout.policy_logprobs for rollout in attempt.rollouts],
            steps=rollout_steps(solver, attempt.rollouts) if method.needs_steps else None,
            wrong=None
            if method.reads_context
            else [
                wrong_tokens(solver, *pair)
                for pair in zip(attempt.rollouts, group_contexts, strict=True)
            ],
        )
        for attempt, group_contexts in zip(attempts, contexts, strict=True)
    ]
