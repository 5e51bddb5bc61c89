"""Text in, text out: frozen models that answer prompts greedily, wherever they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from selfdistill.config import TextEngineConfig


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


def build_text_generator(
    config: TextEngineConfig, *, device: str, today: date | None = None
) -> TextGenerator:
    """Build the configured engine, with its cache on disk if it has one.

    Args:
        config: which engine.
        device: where a model runs that lives in this process ("cpu", "cuda").
        today: the date that its chat template is told; None: that of this day.

    Raises:
        UnusableModelError: a local model cannot be loaded.
        EngineError: the engine cannot start.
    """
    generator: TextGenerator
    match config.name:
        case "server":
            from selfdistill.critic.textgen.server import ServerGenerator

            generator = ServerGenerator(config)
        case "transformers" | "vllm":
            from selfdistill.critic.textgen.local import load_local_generator

            generator = load_local_generator(config, device=device, today=today)
    if config.cache is None:
        return generator
    from selfdistill.critic.textgen.cache import CachedGenerator

    return CachedGenerator(generator, config.cache)
