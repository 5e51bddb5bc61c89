"""From characters of a decoded completion back to its tokens; nothing is ever re-tokenised."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from selfdistill.rollout.engine import Rollout, completion_text


def token_span(
    tokenizer: PreTrainedTokenizerBase, rollout: Rollout, span: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return the completion tokens (start, stop) that overlap a character span of its text."""
    if span is None:
        return None

    def length(tokens: int) -> int:
        """Characters of the first tokens: token i lies between length(i) and length(i + 1)."""
        return len(completion_text(tokenizer, rollout.token_ids[:tokens]))

    places = range(len(rollout.token_ids))
    start = bisect_right(places, span[0], key=lambda token: length(token + 1))
    stop = bisect_left(places, span[1], key=length)
    return (start, stop) if start < stop else None


def token_steps(
    tokenizer: PreTrainedTokenizerBase, rollout: Rollout, steps: Sequence[tuple[int, int]]
) -> list[int]:
    """Return the number of each token's step; -1 outside of steps.

    Steps are counted from 0; one that no token belongs to is not counted.

    Args:
        tokenizer: of the rollout.
        rollout: its text and tokens.
        steps: the character span of each step, in order.
    """
    numbers = [-1] * len(rollout.token_ids)
    spans = [token_span(tokenizer, rollout, span) for span in steps]
    for number, (start, stop) in enumerate(span for span in spans if span is not None):
        numbers[start:stop] = [number] * (stop - start)
    return numbers
