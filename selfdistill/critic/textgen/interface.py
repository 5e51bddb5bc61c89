"""Text in, text out: what every frozen model offers that answers prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
        text: without the token that ended it.
        finished: False when the length limit cut it off.
    """

    text: str
    finished: bool


class TextGenerator(Protocol):
    """A frozen model; the same prompt gets the same answer.

    Attributes:
        identity: all that decides the answer beside the prompt: the model and its settings.
    """

    identity: str

    def check(self, prompt: str) -> None:
        """Make sure, before there is anything to ask, that a prompt of this length has an answer.

        Raises:
            ConfigError: the model has no room for an answer behind it.
        """
        ...

    def generate(self, prompts: Sequence[str]) -> Iterator[tuple[int, Generation]]:
        """Yield the place of each prompt with its answer, in the order in which they get ready.

        Raises:
            EngineError: the model cannot be reached or died; what was yielded before is good.
        """
        ...
