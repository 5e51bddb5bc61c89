"""Reads the step format of arXiv 2606.11173, which `config.tasks.STEP_INSTRUCTION` asks for.

    <step_1> ... <step_2> ... <answer> 42

Closing tags (`</step_1>`, `</answer>`) are allowed and never needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAG = re.compile(r"<(?:step_(?P<number>\d{1,4})|answer)>", re.IGNORECASE)


@dataclass(frozen=True)
class StepSpan:
    """One step of a response.

    Attributes:
        number: as the tag says; None for the answer.
        start, stop: characters of the response, the step's own tag included.
    """

    number: int | None
    start: int
    stop: int


def split_steps(text: str) -> list[StepSpan]:
    """Return the steps of a response in the order of the text; a step ends where the next begins.

    What stands before the first tag belongs to no step.
    """
    tags = list(_TAG.finditer(text))
    stops = [tag.start() for tag in tags[1:]] + [len(text)]
    return [
        StepSpan(int(tag["number"]) if tag["number"] else None, tag.start(), stop)
        for tag, stop in zip(tags, stops, strict=False)  # one stop too many without any tag
    ]


def follows_format(text: str) -> bool:
    """True when a response consists of the steps 1, 2, ..., N (N at least 1) and one answer."""
    steps = split_steps(text)
    numbers = [step.number for step in steps]
    return (
        len(steps) >= 2
        and not text[: steps[0].start].strip()
        and numbers == [*range(1, len(steps)), None]
    )
