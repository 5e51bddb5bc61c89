"""Steps of an attempt beside those of its critique, and which attempts are worth showing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import accumulate, pairwise, zip_longest
from typing import TypeAlias, TypeVar

from selfdistill.analysis.tokens import TokenAnalysis

STEP_TAG = re.compile(r"<(?:step_\d+|answer)>")


T = TypeVar("T")


Row: TypeAlias = tuple[range | None, str, str]
"""One step: the attempt's tokens and text, and the critique's text; None and "" where absent."""


def clear_examples(attempts: Sequence[TokenAnalysis]) -> list[TokenAnalysis]:
    """Return the attempts whose first error follows a right step, sharpest disagreement first.

    They show best what a critique keeps and what it changes; steps that were left out do not.
    """
    return sorted(filter(_follows_a_right_step, attempts), key=_lowest_advantage)


def spread(items: Sequence[T], *, count: int) -> list[T]:
    """Return `count` items at even distances, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def align(record: TokenAnalysis) -> list[Row]:
    """Pair the steps of attempt and critique by their tags; what only one has stands alone."""
    attempts = list(zip_longest(step_tokens(record.tokens), split_steps(record.response)))
    critiques = split_steps(record.context)
    matcher = SequenceMatcher(
        a=[tag_of(text or "") for _, text in attempts],
        b=[tag_of(text) for text in critiques],
        autojunk=False,
    )
    rows = []
    for _, a0, a1, b0, b1 in matcher.get_opcodes():
        for attempt, critique in zip_longest(attempts[a0:a1], critiques[b0:b1]):
            tokens, text = attempt or (None, None)
            rows.append((tokens, text or "", critique or ""))
    return rows


def step_tokens(tokens: Sequence[str]) -> list[range]:
    """Cut tokens into steps; a tag may be spread over several tokens."""
    text = "".join(tokens)
    ends = list(accumulate(map(len, tokens)))
    begins = {
        next(i for i, end in enumerate(ends) if end > m.start()) for m in STEP_TAG.finditer(text)
    }
    cuts = sorted({0, len(tokens)} | begins)
    return [range(start, stop) for start, stop in pairwise(cuts)]


def split_steps(text: str) -> list[str]:
    """Cut a text at its step tags."""
    cuts = [0, *(match.start() for match in STEP_TAG.finditer(text)), len(text)]
    steps = (text[start:stop].strip() for start, stop in pairwise(cuts))
    return [step for step in steps if step]


def _lowest_advantage(record: TokenAnalysis) -> float:
    start, stop = record.wrong_tokens or (0, len(record.tokens))
    return min(record.advantage[start:stop])


def wrong_row(record: TokenAnalysis, rows: Sequence[Row]) -> int | None:
    if record.wrong_tokens is None:
        return None
    start = record.wrong_tokens[0]
    return next(i for i, (tokens, _, _) in enumerate(rows) if tokens and start in tokens)


def is_missing(rows: Sequence[Row], i: int) -> bool:
    return i >= 0 and rows[i][0] is None


def _follows_a_right_step(record: TokenAnalysis) -> bool:
    rows = align(record)
    wrong = wrong_row(record, rows)
    return wrong is not None and wrong > 0 and not is_missing(rows, wrong - 1)


def tag_of(step: str) -> str:
    match = STEP_TAG.match(step)
    return match[0] if match else ""
