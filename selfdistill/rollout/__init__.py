"""Rollout engines sample the student's own attempts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn: softmax temperature, length limit in tokens, seed of this call.

    Prompt i of a call draws from a stream of its own, that of `seed + i`: what it gets depends
    neither on the other prompts nor on how a call is split over batches or ranks (except that
    another batch shape may round the probabilities differently).
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Rollout:
    """One sampled completion; token ids are kept and never re-tokenised.

    Attributes:
        token_ids: the completion, with its end-of-sequence token when `finished`.
        logprobs: the sampling log-prob (nats) of each token at the sampling temperature.
        text: the decoded completion, special tokens dropped.
        finished: False when the length limit cut it off.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finished: bool


class RolloutEngine(Protocol):
    """Samples `group_size` completions for each prompt."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        """Return one list of `group_size` rollouts per prompt (prompts are token ids)."""
        ...


class EngineError(RuntimeError):
    """A rollout engine that failed."""


def sample(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    params: SamplingParams,
) -> list[list[Rollout]]:
    """Return the engine's rollouts, none for no prompts.

    Raises:
        EngineError: whatever the engine raised; the message says what and how to go on.
    """
    if not prompts:
        return []
    try:
        return engine.generate(prompts, group_size=group_size, params=params)
    except Exception as error:
        raise EngineError(
            f"{type(engine).__name__} failed with {type(error).__name__}: {error}. A training run "
            "keeps its last checkpoint: mend the cause, then go on with --resume"
        ) from error
