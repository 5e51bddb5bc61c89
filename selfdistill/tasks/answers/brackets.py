"""Where brackets close, and what stands outside all of them."""

from __future__ import annotations

import re

_OPENING, _CLOSING = "([{", ")]}"


def matching_bracket(text: str, start: int) -> int | None:
    """Return where the bracket at `start` is closed, by any kind of bracket ("[1, 2)"), or None."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in _OPENING) - (text[i] in _CLOSING)
        if depth == 0:
            return i
    return None


def depth_of_brackets(text: str) -> int | None:
    """Return how deep brackets are nested; None where they do not match in number."""
    depth = deepest = 0
    for character in text:
        depth += (character in _OPENING) - (character in _CLOSING)
        deepest = max(deepest, depth)
        if depth < 0:
            return None
    return deepest if depth == 0 else None


def split_outside_brackets(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split at the separators that stand in no bracket; the pieces come without outer spaces."""
    pieces: list[str] = []
    begin = 0
    for found in separator.finditer(text):
        if found.start() >= begin and depth_of_brackets(text[begin : found.start()]) is not None:
            pieces.append(text[begin : found.start()].strip())
            begin = found.end()
    return [*pieces, text[begin:].strip()]
