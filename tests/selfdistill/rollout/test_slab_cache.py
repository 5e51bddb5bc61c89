"""Rows enter and leave, and the cache is written in place."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from exactness import assert_no_worse_than_torch
from padded_step import in_float64
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3NextConfig,
)

from selfdistill.rollout.engine import Rollout, SamplingParams
from selfdistill.rollout.slab_cache import SlabCache
from selfdistill.rollout.transformers_engine import TransformersEngine

ModelFactory = Callable[..., LlamaForCausalLM]
FAMILIES = ("qwen3", "mistral", "gemma3")
# Ragged, some longer than the windows of 5 of mistral and gemma3, and the longest not first.
PROMPTS = [[3, 4, 5, 6], [7, 8], [9] * 13, [3, 9, 4, 8, 5, 7, 6], [10, 11, 12], [13]]


def ends_often(model: PreTrainedModel) -> PreTrainedModel:
    """Make a seventh of the vocabulary end a completion."""
    model.generation_config.eos_token_id = [2, *range(20, 28)]
    return model


def ids(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[rollout.token_ids for rollout in group] for group in groups]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_enter_later_have_the_probabilities_that_they_have_alone(
    family: str, tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = ends_often(tiny_model(family).eval())
    params = SamplingParams(temperature=1.2, max_new_tokens=30, seed=4)
    engine = TransformersEngine(model, tokenizer, batch_size=5)
    groups = engine.generate(PROMPTS, group_size=2, params=params)
    lengths = {len(rollout.token_ids) for group in groups for rollout in group}
    assert len(lengths) > 3
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for rollout in group:
            tokens = torch.tensor(rollout.token_ids)[:, None]
            torchs, exact = (
                (own(torch.tensor([prompt + rollout.token_ids])).logits[0] / 1.2)
                .detach()[len(prompt) - 1 : -1]
                .log_softmax(-1)
                .gather(-1, tokens)[:, 0]
                for own in (model, in_float64(model))
            )
            assert_no_worse_than_torch("log-probs", torch.tensor(rollout.logprobs), torchs, exact)
    # However many rows there are at once.
    assert ids(
        TransformersEngine(model, tokenizer).generate(PROMPTS, group_size=2, params=params)
    ) == ids(groups)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_greedy_tokens_are_those_of_generate(
    family: str, tiny_model: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    model = ends_often(tiny_model(family).eval())
    params = SamplingParams(temperature=0.0, max_new_tokens=24)
    groups = TransformersEngine(model, tokenizer, batch_size=2).generate(
        PROMPTS, group_size=1, params=params
    )
    for prompt, (rollout,) in zip(PROMPTS, groups, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        assert rollout.token_ids == expected[0, len(prompt) :].tolist()


def watch_cache(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Return a list that gets rows, slots and address of the keys after each pass of one token."""
    seen: list[tuple[int, int, int]] = []

    def look(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        keys = kwargs["past_key_values"].layers[0].keys
        if kwargs["input_ids"].shape[1] == 1:
            seen.append((keys.shape[0], keys.shape[2], keys.data_ptr()))

    model.register_forward_hook(look, with_kwargs=True)
    return seen


def test_the_cache_does_not_grow_by_concatenation(
    make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model()
    model.generation_config.eos_token_id = [0]
    seen = watch_cache(model)
    TransformersEngine(model, tokenizer).generate(
        [[1, 4, 8, 5], [1, 4]], group_size=3, params=SamplingParams(max_new_tokens=100, seed=2)
    )
    assert len(seen) > 60
    # Half more each time: 5, 7, 10, 15, ... slots; concatenation moves at every token.
    moves = sum(before[2] != after[2] for before, after in pairwise(seen))
    assert moves <= 10


def test_places_are_taken_again_and_memory_is_bounded(
    make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = ends_often(make_model())
    seen = watch_cache(model)
    prompts = [[1, 4, 8, 5, 3 + i % 9] for i in range(40)]
    engine = TransformersEngine(model, tokenizer, batch_size=6)
    groups = engine.generate(
        prompts, group_size=2, params=SamplingParams(max_new_tokens=20, seed=2)
    )
    rows = [row for row, _, _ in seen]
    assert max(rows) <= 6
    tokens = sum(len(rollout.token_ids) for group in groups for rollout in group)
    # Waiting for whole batches takes more passes: that of each one's longest rollout.
    batches = [groups[i : i + 3] for i in range(0, len(groups), 3)]
    waiting = sum(max(len(r.token_ids) for group in batch for r in group) for batch in batches)
    assert tokens / 6 <= len(seen) < 0.8 * waiting
    # A row has at most 25 tokens, and slots that are empty in all rows are given up.
    assert max(slots for _, slots, _ in seen) <= 1.5 * 25 + 1


def test_a_prompt_longer_than_all_rows_enters() -> None:
    config = tiny_config()
    cache = SlabCache(config)

    def states(rows: int, slots: int, start: float) -> DynamicCache:
        prompt = DynamicCache(config=config)
        values = start + torch.arange(rows * slots, dtype=torch.float32).view(rows, 1, slots, 1)
        for layer in range(config.num_hidden_layers):
            prompt.update(values.expand(rows, 2, slots, 4), values.expand(rows, 2, slots, 4), layer)
        return prompt

    def rows_of(layer: int) -> list[list[float]]:
        return cache.layers[layer].keys[:, 0, :, 0].tolist()

    cache.enter(states(2, 2, 1.0), width=2, repeats=1, rows=3)
    cache.enter(states(1, 4, 10.0), width=4, repeats=2, rows=3)
    expected = [[0, 0, 1, 2], [0, 0, 3, 4], [10, 11, 12, 13], [10, 11, 12, 13]]
    assert rows_of(0) == rows_of(1) == expected
    # The last row takes the first one's place; then the empty slots of the rest are given up.
    cache.batch_select_indices(torch.tensor([3, 1]))
    assert rows_of(0) == [expected[3], expected[1]]
    cache.batch_select_indices(torch.tensor([1]))
    for token in range(40):
        cache.make_room(2 + token, rows=1)
        new = torch.full((1, 2, 1, 4), 20.0 + token)
        for layer in range(config.num_hidden_layers):
            cache.update(new, new, layer)
    assert rows_of(1)[0][-42:] == [3, 4, *range(20, 60)]
    assert cache.width < 1.5 * 42 + 1


def tiny_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8, vocab_size=9
    )


def test_other_caches_are_sampled_in_batches_that_none_joins(
    tiny_model: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = ends_often(tiny_model("qwen3").eval())
    params = SamplingParams(max_new_tokens=20, seed=1)
    engine = TransformersEngine(model, tokenizer, batch_size=4)
    expected = engine.generate(PROMPTS, group_size=2, params=params)
    assert caplog.text == ""
    monkeypatch.setattr(SlabCache, "supports", staticmethod(lambda config: False))
    with caplog.at_level(logging.INFO):
        groups = engine.generate(PROMPTS, group_size=2, params=params)
    assert ids(groups) == ids(expected)
    assert "Qwen3ForCausalLM remembers more than keys and values" in caplog.text


def test_what_remembers_more_than_keys_and_values_is_told_by_its_layers() -> None:
    hybrid = Qwen3NextConfig(
        num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]
    )
    assert not SlabCache.supports(hybrid)
    assert SlabCache.supports(tiny_config())
