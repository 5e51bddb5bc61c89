from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import CohereConfig, CohereForCausalLM, LlamaForCausalLM

from selfdistill.model.lm_head import UnsupportedHeadError, find_lm_head


def test_logit_scale_is_found() -> None:
    config = CohereConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    assert find_lm_head(CohereForCausalLM(config)).logit_scale == 0.25


def test_a_head_that_does_more_is_refused(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits**3)
    with pytest.raises(UnsupportedHeadError, match=r"LlamaForCausalLM.*soft cap alone"):
        find_lm_head(model)
