"""The configured engine for texts."""

from __future__ import annotations

from datetime import date

from selfdistill.config import TextEngineConfig
from selfdistill.critic.textgen.interface import TextGenerator


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
