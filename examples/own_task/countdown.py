"""A task of one's own: reach a number by adding and subtracting given ones (Countdown).

`own_task.yaml` names this file. Only `problems` and `reward` are needed; the others show what there
is besides.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

_SUM = re.compile(r"(\d+(?: *[+-] *\d+)*)")


def problems(split: str) -> list[dict[str, Any]]:
    """Return the problems of a split; every key but `prompt` is handed over to the reward."""
    # Three streams of random numbers, and a prompt that says them all: splits do not overlap.
    generator = random.Random(split)
    found = []
    for _ in range({"train": 64, "dev": 16, "test": 16}[split]):
        numbers = [generator.randint(1, 99) for _ in range(3)]
        first, *others = numbers
        target = first + sum(number * generator.choice((1, -1)) for number in others)
        found.append(
            {
                "prompt": f"Reach {target} with {', '.join(map(str, numbers))}, each used once.",
                "numbers": numbers,
                "target": target,
            }
        )
    # Of the same question in two splits the later one would be refused.
    marks = {"train": 0, "dev": 1, "test": 2}
    return [problem for problem in found if problem["target"] % 3 == marks[split]]


def answer(completion: str) -> str | None:
    """Return the last sum of a completion, for the votes of Maj@k; by default patterns find it."""
    sums = _SUM.findall(completion)
    return sums[-1].replace(" ", "") if sums else None


def reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    numbers: Sequence[Sequence[int]],
    target: Sequence[int],
    **columns: Any,
) -> list[float]:
    """Give 1 for the target, and 0.1 for a sum of the right numbers (the signature is TRL's)."""
    return [_one(*each) for each in zip(completions, numbers, target, strict=True)]


def feedback(
    prompts: Sequence[str], completions: Sequence[str], target: Sequence[int], **columns: Any
) -> list[str | None]:
    """Say what method `environment` shows to the teacher."""
    values = [_value(answer(completion)) for completion in completions]
    return [
        "There is no sum." if value is None else f"It gives {value}, and {goal} was wanted."
        for value, goal in zip(values, target, strict=True)
    ]


def steps(completion: str) -> list[tuple[int, int]]:
    """Return the characters of each line: what `advantage_mask.per_step` judges as a whole."""
    return [line.span() for line in re.finditer(r"[^\n]+", completion)]


def _one(completion: str, numbers: Sequence[int], target: int) -> float:
    text = answer(completion)
    if text is None or sorted(map(int, re.findall(r"\d+", text))) != sorted(numbers):
        return 0.0
    return 1.0 if _value(text) == target else 0.1


def _value(text: str | None) -> int | None:
    return None if text is None else sum(int(part) for part in re.findall(r"[+-]?\d+", text))
