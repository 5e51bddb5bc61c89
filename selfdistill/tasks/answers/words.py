"""Which texts are words, and which are plainly the same."""

from __future__ import annotations

import re

_COMMANDS = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}|\\[a-zA-Z]+")
_WORD = re.compile(r"[^\W\d_]{4,}")
_ONLY_LETTERS = re.compile(r"[^\W\d_]{3,}")
_SHORT_SCRIPT = re.compile(r"([_^])\{(\w)\}")
_LOOSE_SPACE = re.compile(r"(?<![^\W_])\s+|\s+(?![^\W_])|(?<=\d)\s+(?=[^\W\d_])")


def key_of(text: str) -> str:
    """Return what two texts that are plainly the same have in common.

    Spaces count between words and between digits; the case of letters counts unless there is a word
    (Monday is monday, AB is ab, x is not X).
    """
    text = _SHORT_SCRIPT.sub(r"\1\2", _LOOSE_SPACE.sub("", text))
    is_name = text.isalpha() and len(text) > 1
    return text.casefold() if is_name or is_words(text) else text


def is_words(text: str) -> bool:
    """True for a text that is no mathematics: it has a word, or is letters and nothing else."""
    return (
        _ONLY_LETTERS.fullmatch(text) is not None
        or _WORD.search(_COMMANDS.sub(" ", text)) is not None
    )
