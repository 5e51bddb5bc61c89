"""Rollout engines sample the student's own attempts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn: softmax temperature, length limit in tokens, seed of this call."""

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
