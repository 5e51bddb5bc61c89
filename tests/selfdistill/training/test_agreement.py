from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
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
