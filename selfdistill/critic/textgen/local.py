"""A frozen model in this process, behind the same engines that sample rollouts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from selfdistill.config import ConfigError, TransformersTextEngine, VLLMTextEngine
from selfdistill.critic.textgen.interface import Generation
from selfdistill.model.folder import check_vocabulary, load_causal_lm, load_config, load_tokenizer
from selfdistill.prompts.chat import ChatTemplate
from selfdistill.rollout.engine import RolloutEngine, SamplingParams, sample
from selfdistill.rollout.transformers_engine import TransformersEngine

_SETTING = "method.critic.engine"


class LocalGenerator:
    """Answers prompts with a rollout engine (implements `TextGenerator`).

    Args:
        engine: of the frozen model.
        chat: renders a prompt as one user turn.
        max_new_tokens: length limit of an answer.
        max_length: most tokens of a prompt and its answer; None: no limit.
        identity: see `TextGenerator`.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        chat: ChatTemplate,
        *,
        max_new_tokens: int,
        max_length: int | None,
        identity: str,
    ) -> None:
        self._engine = engine
        self._chat = chat
        self._max_length = max_length
        self._params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
        self.identity = identity

    def check(self, prompt: str) -> None:
        """See `TextGenerator`."""
        check_room(
            len(self._chat.encode(prompt)),
            max_new_tokens=self._params.max_new_tokens,
            max_length=self._max_length,
        )

    def generate(self, prompts: Sequence[str]) -> Iterator[tuple[int, Generation]]:
        """Yield all answers, which get ready together.

        A prompt that leaves no room for a whole answer gets an empty, unfinished one.

        Raises:
            EngineError: the engine died.
        """
        ids = [self._chat.encode(prompt) for prompt in prompts]
        asked = []
        for place, prompt in enumerate(ids):
            length = len(prompt) + self._params.max_new_tokens
            if self._max_length is not None and length > self._max_length:
                yield place, Generation("", finished=False)
            else:
                asked.append(place)
        groups = sample(
            self._engine,
            [ids[place] for place in asked],
            group_size=1,
            params=self._params,
            names=[f"the critic's prompt {prompts[place][-80:]!r}" for place in asked],
        )
        for place, (rollout,) in zip(asked, groups, strict=True):
            yield place, Generation(rollout.text, rollout.finished)


def check_room(prompt: int, *, max_new_tokens: int, max_length: int | None) -> None:
    """Refuse a length limit that leaves no room for the critic's shortest prompt.

    Args:
        prompt: tokens of a prompt without question and attempt.
        max_new_tokens, max_length: see `LocalGenerator`.

    Raises:
        ConfigError: the two together are more than the model reads.
    """
    if max_length is not None and prompt + max_new_tokens > max_length:
        raise ConfigError(
            f"method.critic.engine.max_new_tokens is {max_new_tokens}: with the {prompt} tokens "
            "that the critic is told besides question and attempt, that is more than the "
            f"{max_length} positions of its model. Expected less than {max_length - prompt}, as "
            "questions and attempts need room as well: lower it, or take a model that reads more"
        )


def load_critic_chat(
    config: TransformersTextEngine | VLLMTextEngine, *, today: date | None = None
) -> tuple[ChatTemplate, PreTrainedTokenizerBase, int | None]:
    """Load what is needed to know how long a critic's prompt is, and no weights.

    Returns:
        The template, the tokenizer, and the most tokens of a prompt and its answer (None: no
        limit).

    Raises:
        UnusableModelError: the model's configuration, tokenizer or chat template cannot be used.
    """
    model = f"{_SETTING}.model"
    model_config = load_config(config.model, setting=model)
    template = config.chat_template
    tokenizer = load_tokenizer(
        config.model, chat_template=Path(template) if template else None, setting=model
    )
    chat = ChatTemplate(tokenizer, config.template, setting=_SETTING, today=today)
    rows = model_config.get_text_config().vocab_size
    check_vocabulary(tokenizer, chat.largest_token, rows=rows, setting=model)
    positions = getattr(model_config, "max_position_embeddings", None)
    return chat, tokenizer, (config.max_length if config.name == "vllm" else None) or positions


def load_local_generator(
    config: TransformersTextEngine | VLLMTextEngine, *, device: str, today: date | None = None
) -> LocalGenerator:
    """Load a model and its tokenizer.

    Args:
        config: which model, and how it answers.
        device: where it runs.
        today: the date that its chat template is told; None: that of this day.

    Raises:
        UnusableModelError: the model or its chat template cannot be used.
    """
    chat, tokenizer, max_length = load_critic_chat(config, today=today)
    engine: RolloutEngine
    if config.name == "vllm":
        from selfdistill.rollout.vllm_engine import VLLMEngine

        engine = VLLMEngine(config.model, tokenizer, config)
    else:
        dtype = getattr(torch, config.dtype)
        model = load_causal_lm(config.model, dtype=dtype, setting=f"{_SETTING}.model")
        engine = TransformersEngine(
            model.to(device).requires_grad_(False), tokenizer, batch_size=config.batch_size
        )
    deciding = {"name", "model", "dtype", "max_new_tokens", "template", "chat_template"}
    identity = config.model_dump(mode="json", include=deciding)
    if chat.writes_date:
        identity["date"] = (today or date.today()).isoformat()
    return LocalGenerator(
        engine,
        chat,
        max_new_tokens=config.max_new_tokens,
        max_length=max_length,
        identity=json.dumps(identity, sort_keys=True),
    )
