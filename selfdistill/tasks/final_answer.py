r"""Reads the final answer out of a response.

The first of these forms that a response has counts, and of several of its kind the last:

1. tag: `<answer> 42`, in any case of letters, with or without `</answer>`
2. boxed: `\boxed{42}`
3. hashes: a line `#### 42`
4. phrase: "the answer is 42", "Answer: 42"; after these "the answers are 4 and 2", "the answer
   would be 42", which are also said of something else

A configuration may choose among them, order them otherwise, or add regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from selfdistill.config import ANSWER_FORMS

_ANSWER_TAG = re.compile(r"<answer>", re.IGNORECASE)
_ANSWER_END = re.compile(r"</answer>", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)
_THUS = r"(?:[\s,*_]*\b(?:then|therefore|thus|hence)\b,?)?[\s*_]*"
_ASKED = rf"(?:\s+to\s+(?:the|this)\s+(?:question|problem))?{_THUS}"
_PHRASES = tuple(
    re.compile(rf"\b{phrase}{_THUS}[\s*_:]*", re.IGNORECASE)
    for phrase in (
        rf"answer{_ASKED}(?:\bis\b|\bare\b|:|=)",
        rf"(?:answers{_ASKED}(?:\bare\b|:|=)"
        rf"|answers?{_ASKED}\b(?:would|will|should|must)\b{_THUS}\bbe\b)",
    )
)
# Where a sentence that states an answer goes on to something else.
_SENTENCE_END = re.compile(r"\.(?=\s|$)|,?\s+(?:because|since|so|which|as)\b|</?\w+>")
_FENCE = re.compile(r"```\w*\s*\n(.*?)```", re.DOTALL)
_BLOCKS = (
    re.compile(r"\\\[.*?\\\]", re.DOTALL),
    re.compile(r"\$\$.*?\$\$", re.DOTALL),
    re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL),
)


def read_answer(text: str, forms: Sequence[str] = ANSWER_FORMS) -> str | None:
    """Return the final answer of a response as it is written there, on one line.

    None when there is none, or nothing in it.

    Args:
        text: the response.
        forms: what counts as an answer, see `selfdistill.config.tasks.DatasetTaskConfig`.
    """
    for form in forms:
        reader = _READERS.get(form)
        answer = _read_pattern(form, text) if reader is None else reader(text)
        if answer is not None:
            return answer or None
    return None


def _read_tag(text: str) -> str | None:
    """Return what follows the last tag, which counts even when that is nothing."""
    tag = _last(_ANSWER_TAG, text)
    if tag is None:
        return None
    return read_first_statement(_ANSWER_END.split(text[tag.end() :])[0]) or ""


def _read_hashes(text: str) -> str | None:
    hashes = _last(_HASHES, text)
    return None if hashes is None else hashes[1].strip()


def _read_phrase(text: str) -> str | None:
    phrase = next(filter(None, (_last(pattern, text) for pattern in _PHRASES)), None)
    if phrase is None:
        return None
    statement = read_first_statement(text[phrase.end() :])
    if statement is None or statement.startswith((r"\[", "$$", r"\begin")):
        return statement
    return _SENTENCE_END.split(statement)[0].strip().rstrip("*").strip()


def _read_pattern(pattern: str, text: str) -> str | None:
    found = _last(re.compile(pattern, re.MULTILINE), text)
    return None if found is None else " ".join((found[1] or "").split())


def read_first_statement(text: str) -> str | None:
    r"""Return the first line that holds something, or a whole block: \[ ... \] may span lines."""
    text = text.strip()
    fence = _FENCE.match(text)
    if fence:
        text = fence[1].strip()
    for block in _BLOCKS:
        found = block.match(text)
        if found:
            return " ".join(found[0].split())
    return text.splitlines()[0].strip() if text else None


def read_boxed(text: str) -> str | None:
    r"""Return what stands in the last whole \boxed{...}, or None; one that is cut off is no box."""
    boxes = read_boxes(text)
    return boxes[-1].strip() or None if boxes else None


def read_boxes(text: str) -> list[str]:
    r"""Return what stands in each whole \boxed{...} or \fbox{...} of a text, in order.

    A box in a box is part of what the outer one holds.
    """
    closings = _closing_braces(text)
    contents: list[str] = []
    position = 0
    for box in _BOX.finditer(text):
        stop = closings.get(box.end() - 1)
        if stop is not None and box.start() >= position:
            contents.append(text[box.end() : stop])
            position = stop
    return contents


def _closing_braces(text: str) -> dict[int, int]:
    """Return where each opening brace is closed, in one pass: a response may be full of them."""
    closings: dict[int, int] = {}
    still_open: list[int] = []
    for i, character in enumerate(text):
        if character == "{":
            still_open.append(i)
        elif character == "}" and still_open:
            closings[still_open.pop()] = i
    return closings


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    found = list(pattern.finditer(text))
    return found[-1] if found else None


_READERS: Mapping[str, Callable[[str], str | None]] = {
    "tag": _read_tag,
    "boxed": read_boxed,
    "hashes": _read_hashes,
    "phrase": _read_phrase,
}
