"""The process in which math-verify runs: one JSON pair [gold, answer] a line in, true or false out.

Started and, when it must be, killed by `selfdistill.tasks.answers.MathVerifyChecker`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys

from math_verify import parse, verify
from math_verify.errors import TimeoutException

# For reading each of the two answers, and for comparing them.
SECONDS = 5
# Sympy can ask for more than a machine has: 9**9**9 as an exact integer.
MEMORY_BYTES = 4 << 30
_MATH_MARKS = ("$", r"\(", r"\[", r"\boxed")


def equal(gold: str, answer: str) -> bool:
    """True when math-verify finds both equal, within the time limits."""
    try:
        return bool(
            verify(
                parse(as_math(gold), parsing_timeout=SECONDS),
                parse(as_math(answer), parsing_timeout=SECONDS),
                timeout_seconds=SECONDS,
            )
        )
    # TimeoutException is no Exception; sympy raises all kinds on text that is no mathematics.
    except (Exception, TimeoutException):
        return False


def as_math(text: str) -> str:
    """Mark a bare expression as mathematics: math-verify reads LaTeX between delimiters only."""
    return text if any(mark in text for mark in _MATH_MARKS) else f"${text}$"


def main() -> None:
    """Answer until the input ends."""
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(equal(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
