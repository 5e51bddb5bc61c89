"""A frozen model in this process, behind the same engines that sample rollouts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from selfdistill.chat import ChatTemplate
from selfdistill.config import TransformersTextEngine, VLLMTextEngine
from selfdistill.model_folder import (
    check_vocabulary,
    load_causal_lm,
    load_config,
    load_tokenizer,
)
from selfdistill.rollout import RolloutEngine, SamplingParams, sample
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.textgen import Generation


class LocalGenerator:
    """Answers prompts with a rollout engine (implements `selfdistill.textgen.TextGenerator`).

    Args:
        engine: of the frozen model.
        chat: renders a prompt as one user turn.
        max_new_tokens: length limit of an answer.
        identity: see `TextGenerator`.
    """

    def __init__(
        self, engine: RolloutEngine, chat: ChatTemplate, *, max_new_tokens: int, identity: str
    ) -> None:
        self._engine = engine
        self._chat = chat
        self._params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
        self.identity = identity

    def generate(self, prompts: Sequence[str]) -> Iterator[tuple[int, Generation]]:
        """Yield all answers, which get ready together.

        Raises:
            ValueError: a prompt leaves no room for `max_new_tokens`.
            EngineError: the engine died.
        """
        ids = [self._chat.encode(prompt) for prompt in prompts]
        groups = sample(
            self._engine,
            ids,
            group_size=1,
            params=self._params,
            names=[f"the critic's prompt {prompt[-80:]!r}" for prompt in prompts],
        )
        for place, (rollout,) in enumerate(groups):
            yield place, Generation(rollout.text, rollout.finished)


def load_local_generator(
    config: TransformersTextEngine | VLLMTextEngine, *, device: str
) -> LocalGenerator:
    """Load a model and its tokenizer.

    Raises:
        UnusableModelError: the model or its chat template cannot be used.
    """
    setting = "method.critic.engine"
    template = config.chat_template
    tokenizer = load_tokenizer(
        config.model,
        chat_template=Path(template) if template else None,
        setting=f"{setting}.model",
    )
    chat = ChatTemplate(tokenizer, config.template, setting=setting)
    rows = load_config(config.model, setting=f"{setting}.model").get_text_config().vocab_size
    check_vocabulary(tokenizer, chat.largest_token, rows=rows, setting=f"{setting}.model")
    engine: RolloutEngine
    if config.name == "vllm":
        from selfdistill.rollout.vllm_engine import VLLMEngine

        engine = VLLMEngine(config.model, tokenizer, config)
    else:
        dtype = getattr(torch, config.dtype)
        model = load_causal_lm(config.model, dtype=dtype, setting=f"{setting}.model")
        engine = TransformersEngine(
            model.to(device).requires_grad_(False), tokenizer, batch_size=config.batch_size
        )
    deciding = {"name", "model", "dtype", "max_new_tokens", "template", "chat_template"}
    return LocalGenerator(
        engine,
        chat,
        max_new_tokens=config.max_new_tokens,
        identity=json.dumps(config.model_dump(mode="json", include=deciding), sort_keys=True),
    )
