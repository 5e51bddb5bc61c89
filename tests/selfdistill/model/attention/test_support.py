"""Which families can share prefixes, and that the others say so by name before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DiffLlamaConfig,
    Gemma2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    NemotronConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from selfdistill.model.attention import (
    IMPLEMENTATION,
    UnsupportedModelError,
    check_model_supports_prefix_sharing,
    enable_prefix_sharing,
    support,
)

ModelFactory = Callable[..., PreTrainedModel]
TINY = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
PAIRED = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "qwen3_moe", "gpt_neox"])
def test_supported_families(tiny_model: ModelFactory, family: str) -> None:
    model = tiny_model(family)
    check_model_supports_prefix_sharing(model)
    assert model.config._attn_implementation == "sdpa"  # a check changes nothing


def test_a_peft_model_is_supported(tiny_model: ModelFactory) -> None:
    student = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    enable_prefix_sharing(student)
    assert student.get_base_model().config._attn_implementation == IMPLEMENTATION


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=1),
            "MambaForCausalLM cannot share prefixes: it keeps a recurrent state",
        ),
        (
            Qwen3NextConfig(**TINY, **HEADS, num_experts=2, num_experts_per_tok=1),
            "Qwen3NextForCausalLM cannot share prefixes: it keeps a recurrent state",
        ),
        (
            Llama4TextConfig(**TINY, **HEADS, num_local_experts=2, pad_token_id=0),
            r"Llama4ForCausalLM cannot share .*layer_types has \['chunked_attention'\]",
        ),
        (Gemma2Config(**TINY, **HEADS), "attn_logit_softcapping is 50.0"),
        (
            LlamaConfig(**TINY, **HEADS, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
            "rope_type 'dynamic'",
        ),
        (
            GptOssConfig(**TINY, **HEADS, num_local_experts=2, num_experts_per_tok=1),
            "passes s_aux",
        ),
        (
            BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=2),
            "BloomForCausalLM .* cannot be replaced through AttentionInterface",
        ),
        (
            NemotronConfig(**TINY, **PAIRED),
            "NemotronForCausalLM .* do not call the attention set through AttentionInterface",
        ),
        (DiffLlamaConfig(**TINY, **PAIRED), "layer 0 attends more than once in a pass"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_families_that_cannot_share_say_so(config: PreTrainedConfig, message: str) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match=message):
        check_model_supports_prefix_sharing(model)
    with pytest.raises(UnsupportedModelError, match=message):
        enable_prefix_sharing(model)
    assert model.config._attn_implementation == "eager"


def test_an_encoder_decoder_says_so() -> None:
    config = T5Config(
        vocab_size=61, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    with pytest.raises(
        UnsupportedModelError,
        match="T5ForConditionalGeneration cannot share prefixes: it is an encoder-decoder",
    ):
        check_model_supports_prefix_sharing(T5ForConditionalGeneration(config))


def test_a_window_that_lies_in_the_mask_only_is_found() -> None:
    """The window is longer than the probe, so its numbers are right; training's would not be."""
    config = PhimoeConfig(
        **TINY, **PAIRED, num_local_experts=2, num_experts_per_tok=1, sliding_window=64
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        UnsupportedModelError, match=r"layer 0 has a sliding window of 64 .* but hands None"
    ):
        check_model_supports_prefix_sharing(model)


def test_a_layer_that_mixes_tokens_is_measured(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama")

    def mix(module: torch.nn.Module, args: object, out: torch.Tensor) -> torch.Tensor:
        return out + 0.1 * out.roll(1, dims=1)  # a convolution over the row, as some families have

    model.model.layers[1].mlp.register_forward_hook(mix)
    with pytest.raises(UnsupportedModelError, match="some layer mixes tokens"):
        check_model_supports_prefix_sharing(model)


def test_wrong_lent_keys_are_measured(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's pass alone would not notice."""

    class Shifted(support.PrefixStash):
        def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            key, value = super().__getitem__(layer)
            return key.roll(1, dims=2), value

    monkeypatch.setattr(support, "PrefixStash", Shifted)
    with pytest.raises(UnsupportedModelError, match="packed hidden states differ"):
        check_model_supports_prefix_sharing(tiny_model("llama"))


def test_the_check_computes_with_the_backend_of_training(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees: list[Any] = []

    class Spy(support.PrefixTree):
        def __init__(self, *args: Any, **options: Any) -> None:
            trees.append(options["backend"])
            super().__init__(*args, **options)

    monkeypatch.setattr(support, "PrefixTree", Spy)
    check_model_supports_prefix_sharing(tiny_model("llama"), backend="loop")
    assert trees == ["loop", "loop"]
