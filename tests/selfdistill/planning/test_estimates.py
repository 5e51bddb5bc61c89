from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from selfdistill.planning.estimates import (
    ROLLOUT_RATE,
    ModelShape,
    StepShape,
    Weights,
    loss_plan,
    plan_flops,
    plan_memory,
    sharded_memory,
    time_shares,
)

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
STEP = StepShape(
    prompts=2,
    group_size=3,
    prompt=10,
    context=5,
    completion=20,
    tokens_per_pass=1000,
    rollout_rows=4,
)


def tiny(tied: bool = True) -> PreTrainedConfig:
    return LlamaConfig(**TINY, tie_word_embeddings=tied)


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_is_the_real_models(tied: bool) -> None:
    shape = ModelShape.of(tiny(tied))
    real = AutoModelForCausalLM.from_config(tiny(tied))
    assert shape.parameters == shape.trained == sum(p.numel() for p in real.parameters())
    matrices = sum(p.numel() for p in real.get_decoder().layers.parameters())
    assert shape.matrix_parameters == matrices + 48  # the last norm
    assert (shape.hidden, shape.kv_heads, shape.head_dim, shape.vocabulary) == (48, 2, 16, 61)


@pytest.mark.parametrize("target", ["all-linear", ("q_proj", "down_proj")])
def test_adapters_are_counted_as_peft_makes_them(target: Any) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft")
    shape = ModelShape.of(tiny(), rank=4, target_modules=target)
    model = AutoModelForCausalLM.from_config(tiny())
    names = target if isinstance(target, str) else list(target)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names)
    )
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert shape.trained == shape.adapters == trained


def test_sharded_memory_follows_its_formulas() -> None:
    full, lora = ModelShape.of(tiny()), ModelShape.of(tiny(), rank=4)
    p, a = full.parameters, lora.adapters
    half = Weights(itemsize=2, teacher="base")
    # Trained weights are float32 only; the teacher is half of that.
    assert sharded_memory(full, half) == (16 * p + 2 * p, 2 * p)
    assert sharded_memory(full, Weights(itemsize=4, teacher="live")) == (16 * p, 4 * p)
    for follows in ("ema", "refreshed"):
        assert sharded_memory(full, replace(half, teacher=follows)) == (16 * p + 4 * p, 2 * p)
    assert sharded_memory(lora, half) == (16 * a + 2 * p, 2 * (p + a))
    assert sharded_memory(lora, replace(half, teacher="ema"))[0] == 16 * a + 2 * p + 4 * a + 2 * p


def test_memory_follows_its_formulas() -> None:
    shape = ModelShape.of(tiny())
    p = shape.parameters
    full = plan_memory(shape, STEP, Weights(itemsize=4, teacher="base"))
    assert full["weights"] == full["teacher (base)"] == full["gradients"] == 4 * p
    assert full["master weights"] == 0
    assert full["optimizer (AdamW)"] == 8 * p
    # Two tensors, 3 layers, 2 heads of 16, 30 tokens, 4 rows.
    assert full["rollout cache"] == 2 * 4 * 3 * 2 * 16 * 30 * 4
    tokens = 2 * 10 + 6 * 20
    layer = 4 * tokens * (6 * 48 + 2 * 6 * 16 + 4 * 64)
    assert full["activations"] == 3 * layer
    assert full["loss workspace"] == loss_plan(shape, STEP, Weights()).bytes > 0

    half = plan_memory(shape, STEP, Weights(itemsize=2, teacher="ema", checkpointing=True))
    assert (half["weights"], half["master weights"]) == (2 * p, 4 * p)
    assert half["teacher (ema)"] == 6 * p
    refreshed = Weights(itemsize=2, teacher="refreshed", checkpointing=True)
    assert plan_memory(shape, STEP, refreshed)["teacher (refreshed)"] == 6 * p
    assert half["activations"] == 2 * tokens * 3 * 48 + layer // 2
    assert plan_memory(shape, STEP, Weights(teacher="live"))["teacher (live)"] == 0

    adapted = ModelShape.of(tiny(), rank=4)
    lora = plan_memory(adapted, STEP, Weights(itemsize=2))
    assert lora["weights"] == 2 * (p + adapted.adapters)
    assert lora["teacher (base)"] == 0  # the adapters are switched off
    assert lora["optimizer (AdamW)"] == 8 * adapted.adapters

    engine = replace(STEP, engine_bytes=123)
    assert plan_memory(shape, engine, Weights())["rollout cache"] == 123


def test_linear_flops_are_those_of_the_model() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # Almost no attention, no norms worth mentioning: what remains is counted exactly.
    config = tiny(tied=False)
    step = replace(STEP, group_size=1, prompt=4, completion=4, context=0)
    shape = ModelShape.of(config)
    model = AutoModelForCausalLM.from_config(config)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    ids = torch.ones(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.get_decoder()(input_ids=ids)
    counted = counter.get_flop_counts()["Global"]
    linear = sum(flops for op, flops in counted.items() if "mm" in str(op) and "bmm" not in str(op))
    attention = 4 * 16 * 3 * 4 * 16 * (4 + 2)
    planned = plan_flops(shape, step, Weights())["student forward"]
    assert planned - attention - 16 * 2 * norms == linear


def test_phases_cost_what_the_method_asks_for() -> None:
    shape = ModelShape.of(tiny())
    base = plan_flops(shape, STEP, Weights(teacher="base"))
    live = plan_flops(shape, STEP, Weights(teacher="live"))
    none = plan_flops(shape, STEP, Weights(teacher=None))
    assert base["teacher forward"] > live["teacher forward"]
    assert "teacher forward" not in none
    assert base["student backward"] == 2 * base["student forward"]
    again = plan_flops(shape, STEP, Weights(checkpointing=True))
    assert again["student backward"] == 3 * base["student forward"]
    lora = plan_flops(ModelShape.of(tiny(), rank=4), STEP, Weights())
    assert lora["student backward"] == lora["student forward"]
    gemm = 2 * 120 * 48 * 61
    assert base["loss"] == 4 * gemm  # two heads, dH, dW
    assert lora["loss"] == 3 * gemm  # the head is frozen
    assert none["loss"] == 3 * gemm  # one head
    shares = time_shares(base)
    assert sum(shares.values()) == pytest.approx(1)
    ratio = shares["rollout"] / shares["student forward"]
    assert ratio == pytest.approx(base["rollout"] / base["student forward"] / ROLLOUT_RATE)


def test_other_families_have_a_shape() -> None:
    qwen = Qwen3Config(**TINY, tie_word_embeddings=True)
    assert ModelShape.of(qwen).heads == 4
    from transformers import GPT2Config

    gpt2 = GPT2Config(vocab_size=61, n_embd=48, n_layer=2, n_head=4)
    shape = ModelShape.of(gpt2)
    assert (shape.intermediate, shape.kv_heads, shape.head_dim) == (192, 4, 12)
