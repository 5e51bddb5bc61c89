"""Types of command-line arguments, whose errors argparse prints as they are."""

from __future__ import annotations

from argparse import ArgumentTypeError

from benchmarks.memory import MEBIBYTE
from benchmarks.problems import Shape


def shape(text: str) -> Shape:
    """N/H/V."""
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    """An integer above 0."""
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def workspace(text: str) -> str | int:
    """Bytes from mebibytes, or "auto"."""
    return text if text == "auto" else positive(text) * MEBIBYTE
