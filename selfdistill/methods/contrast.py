"""What a right critique says beyond one that is of no use: a contrast of two teachers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from functools import partial

import torch
from torch import Tensor

from selfdistill.config import ContrastMethod
from selfdistill.critic.build import build_critic
from selfdistill.critic.interface import Critic, Critique, critique_all
from selfdistill.methods.method import Contexts, Gather, Method
from selfdistill.methods.policy_gradient import PolicyGradientLoss, known
from selfdistill.model.device import resolve_device
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import ScoredTokens
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import MistakenTask, Problem, Task


def contrast(
    settings: ContrastMethod, task: Task, *, temperature: float, device: str, today: date | None
) -> Method:
    """Build the contrast of two critiques.

    From what is reported of arXiv 2606.11709 (RLCSD): the signal of self-distillation sits on
    tokens of style, and the gap under a wrong hint is subtracted (`against: wrong`); of arXiv
    2605.11613 (CREDIT): the gap of other inputs of the batch is (`against: other`). Ours are the
    critiques in place of their hints, what a wrong one says (`wrong_critiques`), one other problem
    drawn for each attempt in place of a mean over the batch, the weight, and the clipped ratio.

    Args:
        settings: of the method; the critic is among them.
        task: see `build_critic`.
        temperature: at which the rollouts are sampled.
        device, today: see `build_method`.

    Raises:
        ConfigError: see `build_critic`.
    """
    critic = build_critic(settings.critic, task, device=resolve_device(device), today=today)
    loss = ContrastLoss(
        weight=settings.weight,
        temperature=temperature,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
    )
    method = Method(settings.name, settings.group_size, loss, partial(right, critic), critic=critic)
    if settings.against == "other":
        return replace(method, complete=with_others)
    return replace(method, contexts=partial(with_wrong, task, critic))


def right(critic: Critic, attempts: Sequence[Attempts]) -> Contexts:
    """Return the critique of every rollout; None where the critic has nothing to say."""
    return [[_context(c) for c in found] for found in critique_all(critic, attempts)]


def _context(critique: Critique | None, contrast: str | None = None) -> TeacherContext | None:
    if critique is None or not critique.text.strip():
        return None
    return TeacherContext("critique", critique.text, contrast=contrast)


def with_wrong(task: Task, critic: Critic, attempts: Sequence[Attempts]) -> Contexts:
    """Return each rollout's critique with a wrong one; None where either is missing."""
    contexts: Contexts = []
    for attempt, found in zip(attempts, critique_all(critic, attempts), strict=True):
        pairs = zip(attempt.rollouts, found, strict=True)
        wrong = [
            None if c is None else wrong_critique(task, attempt.problem, rollout.text, c)
            for rollout, c in pairs
        ]
        contexts.append(
            [
                None if text is None else _context(critique, text)
                for critique, text in zip(found, wrong, strict=True)
            ]
        )
    return contexts


def wrong_critique(task: Task, problem: Problem, response: str, right: Critique) -> str | None:
    """Return what a critic writes that takes right for wrong and wrong for right.

    - Of an attempt that went wrong the attempt, verbatim: what the schema writes of a right one.
    - Of a right attempt the attempt up to a step drawn at random, that step with a wrong result,
      and what follows from it; None where the task cannot write mistakes.
    - Of one that was cut off None: there is nothing to take for right.

    Args:
        task: may be a `MistakenTask`.
        problem, response: the attempt.
        right: its critique.
    """
    if right.case == "C" or not response.strip():
        return None
    if right.case != "A":
        return response
    if not isinstance(task, MistakenTask):
        return None
    # It follows from problem and attempt alone, so that a run that goes on hears the same.
    draw = random.Random(f"contrast/{problem.id}/{response}")
    return task.mistake(problem, response, at=draw.random())


def with_others(attempts: Sequence[Attempts], contexts: Contexts, gather: Gather) -> Contexts:
    """Return the contexts with a critique of the next problem's attempts; None where none is left.

    Args:
        attempts: of this rank.
        contexts: of theirs.
        gather: returns the items of all ranks in order, so that the next problem does not depend
            on the number of ranks.
    """
    own = [
        (attempt.problem.id, [context.text for context in group if context is not None])
        for attempt, group in zip(attempts, contexts, strict=True)
    ]
    all_texts: list[tuple[str, list[str]]] = gather(own)
    places = {problem: i for i, (problem, _) in reversed([*enumerate(all_texts)])}

    def others_of(problem: str) -> list[str]:
        start = places[problem]
        following = [*all_texts[start:], *all_texts[:start]]
        return next((texts for name, texts in following if name != problem and texts), [])

    completed: Contexts = []
    for (problem, _), group in zip(own, contexts, strict=True):
        others = others_of(problem)
        completed.append(
            [
                None
                if context is None or not others
                else replace(context, contrast=others[i % len(others)])
                for i, context in enumerate(group)
            ]
        )
    return completed


class ContrastLoss(PolicyGradientLoss):
    """The policy gradient of the contrast of two teachers (see `PolicyGradientLoss`).

    With T the teacher's distribution given the right critique and T' that given the other one, a
    token y has the advantage, in nats,

        A = log T(y) - weight * log T'(y) - (1 - weight) * log S(y)

    the gap log T - log S less `weight` times the gap log T' - log S.

    Args:
        temperature, clip_low, clip_high: see `PolicyGradientLoss`.
        weight: how much of the other gap is subtracted.
    """

    def __init__(
        self, *, weight: float, temperature: float, clip_low: float, clip_high: float
    ) -> None:
        super().__init__(temperature=temperature, clip_low=clip_low, clip_high=clip_high)
        self.weight = weight

    def advantages(self, scored: ScoredTokens, logprobs: Tensor, teacher: LMHead) -> Tensor:
        """Return [T] A."""
        states = (
            known("scored.teacher_hidden", scored.teacher_hidden),
            known("scored.contrast_hidden", scored.contrast_hidden),
        )
        with torch.no_grad():
            right, other = (self.logprobs(h, scored.targets, teacher)[0] for h in states)
        return right - self.weight * other - (1 - self.weight) * logprobs

    def has_advantages(self, group: PromptGroup) -> bool:
        """Return True: only scoring shows where the two critiques differ."""
        return True
