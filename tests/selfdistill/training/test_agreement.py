from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from selfdistill.model.lm_head import find_lm_head
from selfdistill.rollout.engine import SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.training.agreement import EngineMismatchError, check_agreement

ModelFactory = Callable[..., LlamaForCausalLM]
PROMPTS = [[1, 4, 9, 10, 11, 12, 5], [1, 4, 8, 5]]


@pytest.fixture
def model(make_model: ModelFactory) -> LlamaForCausalLM:
    return make_model()


@pytest.mark.parametrize("temperature", [1.3, 0.0])
def test_fresh_rollouts_agree_and_changed_weights_do_not(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, temperature: float
) -> None:
    head = find_lm_head(model)
    params = SamplingParams(temperature=temperature, max_new_tokens=20, seed=1)
    groups = TransformersEngine(model, tokenizer).generate(PROMPTS, group_size=3, params=params)

    def check() -> float:
        return check_agreement(
            model,
            head,
            PROMPTS,
            groups,
            params=SamplingParams(temperature=temperature),
            tolerance=1e-4,
        )

    # At most the 1e-4 nats that training allows: log-probs of order 5, and two passes of two layers
    # that each round them by some 1e-6.
    assert check() <= 1e-4
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.05)
    with pytest.raises(EngineMismatchError, match="samples from other weights") as caught:
        check()
    assert caught.value.difference > 1e-3
    assert caught.value.tolerance == 1e-4


def test_the_worst_token_is_named(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    params = SamplingParams(max_new_tokens=20, seed=1)
    groups = TransformersEngine(model, tokenizer).generate(PROMPTS, group_size=2, params=params)
    rollout = groups[1][0]
    for wrong in (rollout.logprobs[1] - 0.5, float("nan")):
        logprobs = [*rollout.logprobs[:1], wrong, *rollout.logprobs[2:]]
        groups[1][0] = replace(rollout, logprobs=logprobs)
        with pytest.raises(EngineMismatchError, match="token 1 of rollout 2"):
            check_agreement(
                model,
                find_lm_head(model),
                PROMPTS,
                groups,
                params=SamplingParams(temperature=1.0),
                tolerance=1e-4,
            )


@pytest.mark.parametrize("cut", [{"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.9}])
def test_rounding_decides_about_what_is_kept_but_another_model_does_not(
    model: LlamaForCausalLM,
    make_model: ModelFactory,
    tokenizer: PreTrainedTokenizerBase,
    cut: dict[str, Any],
) -> None:
    """An engine in bfloat16 keeps other tokens than float32 does, and its runs are sound."""
    other = make_model(seed=9)
    with torch.no_grad():
        for seed, each in enumerate((model, other)):
            torch.manual_seed(seed)
            # A head of its own, that has preferences.
            each.lm_head.weight = nn.Parameter(torch.randn_like(each.lm_head.weight) / 5)
    engine_model = deepcopy(model)
    generator = torch.Generator().manual_seed(0)

    def rounded(module: nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
        noise = 0.03 * torch.randn(logits.shape, generator=generator)
        return (logits + noise).bfloat16().float()

    engine_model.lm_head.register_forward_hook(rounded)
    params = SamplingParams(max_new_tokens=40, seed=1, **cut)

    def check(sampled_from: LlamaForCausalLM) -> float:
        engine = TransformersEngine(sampled_from, tokenizer)
        groups = engine.generate(PROMPTS, group_size=32, params=params)
        head = find_lm_head(model)
        return check_agreement(model, head, PROMPTS, groups, params=params, tolerance=1.0)

    assert check(engine_model) < 0.5
    with pytest.raises(EngineMismatchError, match="samples from other weights"):
        check(other)
