"""What a training step says of itself: a line of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfdistill.rollout.attempts import Attempts


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl; per-token figures are means over the completion tokens read.

    None stands for what the step does not have: no teacher, or no token that was read. With several
    updates a step, the loss and what belongs to it are those of the last update.

    Attributes:
        step: the training step, from 1.
        loss: the minimised loss (tokens that the advantage mask drops count as 0).
        kl: the divergence of the objective, in nats (GRPO: from the base model).
        advantage: log p_teacher(y) - log p_student(y), in nats (policy gradients: theirs).
        entropy: of the student's next-token distribution, in nats.
        active: share of all completion tokens, read or not, that carry a gradient.
        taught: whether any token carried one in any of the updates, a KL penalty aside.
        reward: mean of the rollouts' rewards; of most tasks the share with the right answer.
        undecided: rollouts that count as wrong because the answer checker ran out of time.
        tied: share of the prompts whose rollouts all got the same reward.
        dropped: rollouts that were left out because the method has no context for them.
        too_long: rollouts that were left out because a prompt did not fit (`prompt.too_long`).
        unusable: how many answers of a language model as the critic were no critique, by reason.
        engine_disagreement: largest difference between the rollout engine's log-prob of a token and
            the trainer's own, in nats; None where nothing was compared.
        contexts: how many rollouts had which kind of context; "none" had none.
        grad_norm: norm of the gradient before clipping.
        learning_rate: that this step was taken with.
        tokens: completion tokens of the rollouts that were not left out.
        packed_tokens: tokens that student and teacher read.
        unshared_tokens: what they would have read without prefix sharing.
        seconds: wall time of each phase.
        peak_rss_mib: highest resident memory of the process so far.
    """

    step: int
    loss: float
    kl: float | None
    advantage: float | None
    entropy: float | None
    active: float
    taught: bool
    reward: float
    undecided: int
    tied: float
    dropped: int
    too_long: int
    unusable: dict[str, int]
    engine_disagreement: float | None
    contexts: dict[str, int]
    grad_norm: float
    learning_rate: float
    tokens: int
    packed_tokens: int
    unshared_tokens: int
    seconds: dict[str, float]
    peak_rss_mib: float


def rewards(attempts: Sequence[Attempts]) -> list[float]:
    """Return the reward of every rollout."""
    return [verdict.reward for attempt in attempts for verdict in attempt.verdicts]


def tied(attempts: Sequence[Attempts]) -> list[bool]:
    """Return for every prompt whether its rollouts got one reward, which teaches GRPO nothing."""
    return [len({verdict.reward for verdict in attempt.verdicts}) == 1 for attempt in attempts]
