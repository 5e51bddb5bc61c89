"""The process in which math-verify runs: one JSON pair [gold, answer] a line in, one verdict out.

Verdicts are true, false, and null for what took too long. Started and, when it must be, killed by
`selfdistill.tasks.answers.pool.WorkerPool`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import sympy
from latex2sympy2_extended.latex2sympy2 import (
    ConversionConfig,
    NormalizationConfig,
    latex2sympy,
)
from math_verify import verify

from selfdistill.tasks.answers.equality import Verdict, compare

SECONDS = 3.0
"""Of processor time, for one comparison with all its parts: a busy machine changes no verdict. What
cannot be interrupted is killed from outside."""
# Sympy can ask for more than a machine has, such as for a large power as an exact integer.
MEMORY_BYTES = 4 << 30

_SPELLING = NormalizationConfig(
    basic_latex=True,
    units=False,  # it takes the variables of 2t and 2h for units
    malformed_operators=True,
    nits=False,
    boxed="none",
    equations=False,
)
_CONVERSION = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
_I = sympy.Symbol("i", real=True)


class OutOfTime(BaseException):
    """The comparison at hand has used its time; no Exception, which sympy would swallow."""


def read(expression: str) -> sympy.Basic:
    """Return the sympy expression of a LaTeX one.

    Raises:
        Exception: of any kind, where it is no mathematics.
    """
    parsed = latex2sympy(
        expression,
        is_real=True,
        convert_degrees=True,
        normalization_config=_SPELLING,
        conversion_config=_CONVERSION,
    )
    return parsed.subs(_I, sympy.I)


def same_expression(gold: str, answer: str) -> Verdict:
    """True when math-verify finds two LaTeX expressions equal."""
    try:
        first, second = read(gold), read(answer)
        both = (first, second)
        if all(isinstance(side, sympy.Expr) for side in both) and any(map(_is_symbol, both)):
            first, second = first - second, sympy.S.Zero  # it would read letters: x is not 2x/2
        # A limit of verify's own would end the one around the whole comparison.
        return bool(verify(first, second, allow_set_relation_comp=True, timeout_seconds=None))
    except Exception:  # sympy raises all kinds on text that is no mathematics
        return False


def _is_symbol(expression: sympy.Basic) -> bool:
    return isinstance(expression, sympy.Symbol)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so much processor time, and again each second after."""
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def judge(gold: str, answer: str) -> Verdict:
    """Return whether both mean the same; None when it takes longer than SECONDS."""
    try:
        with time_limit(SECONDS):
            return compare(gold, answer, same_expression)
    except (OutOfTime, MemoryError, RecursionError):
        return None


def main() -> None:
    """Answer until the input ends."""
    logging.disable(logging.CRITICAL)

    def give_up(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    signal.signal(signal.SIGPROF, give_up)
    with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    same_expression(r"\sqrt{8}", r"2\sqrt{2}")  # the first comparison loads more of sympy
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(judge(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
