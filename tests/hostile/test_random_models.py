"""Models that drop or add noise at random: what eval mode switches off changes no number, and what
it does not switch off is refused by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selfdistill.config import Config, LossConfig
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.model.attention import UnsupportedModelError
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.randomness import (
    RandomModelError,
    check_not_random,
    enable_activation_checkpointing,
    refuse_random_passes,
)
from selfdistill.model.scoring import score
from selfdistill.model.teacher import LiveTeacher
from selfdistill.rollout.engine import SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.training.gradients import StudentLoss, accumulate_gradients
from selfdistill.training.loop import train

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GROUPS = [
    PromptGroup([4, 5, 6, 7], [[4, 5, 6, 9, 10, 7]] * 2, [[11, 12, 13, 14], [15, 16]]),
    PromptGroup([4, 8], [[4, 8, 9, 8]], [[17, 18, 19]]),
]
NOISY = {
    "Mixtral": MixtralConfig(**TINY, **EXPERTS, router_jitter_noise=0.1),
    # Its own routers draw experts at random in train mode, whatever the two settings are.
    "PhiMoE": PhimoeConfig(**TINY, **EXPERTS, router_jitter_noise=0.1, input_jitter_noise=0.1),
}


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    teacher = LiveTeacher()
    loss = DistillationLoss(LossConfig())
    objective = StudentLoss(model, teacher, loss, lm_heads=find_lm_heads(model, teacher))
    accumulate_gradients(objective, GROUPS, tokens_per_pass=10_000)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", NOISY)
def test_a_replayed_layer_has_no_noise(family: str) -> None:
    """In train mode the gradients differed by 1.6 to 4.5 %."""
    expected = gradients(build(NOISY[family]))
    model = build(NOISY[family])
    enable_activation_checkpointing(model)
    refuse_random_passes(model)
    saved: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        got = gradients(model)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        recomputed = sum(saved)
        saved.clear()
        gradients(build(NOISY[family]))
    assert recomputed < 0.7 * sum(saved)  # layers were checkpointed indeed


def test_sampling_leaves_every_module_its_mode() -> None:
    tokenizer = build_tokenizer()
    model = build(Qwen3Config(**{**TINY, "vocab_size": len(tokenizer)}))
    enable_activation_checkpointing(model)
    before = [module.training for module in model.modules()]
    assert {True, False} == {*before}
    engine = TransformersEngine(model, tokenizer)
    engine.generate([[4, 5]], group_size=1, params=SamplingParams(max_new_tokens=2))
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("family", NOISY)
def test_noise_in_train_mode_is_refused(family: str) -> None:
    model = build(NOISY[family]).train()
    for check in (refuse_random_passes, lambda m: score(m, LiveTeacher(), GROUPS)):
        with pytest.raises(
            RandomModelError, match=r"config\.(router|input)_jitter_noise is 0\.1 .*model\.eval\(\)"
        ):
            check(model)


def test_routers_that_draw_by_themselves_are_found() -> None:
    config = PhimoeConfig(**TINY, **EXPERTS, router_jitter_noise=0.0, input_jitter_noise=0.0)
    with pytest.raises(
        RandomModelError, match=r"model\.layers\.0\.\S+, a PhimoeTopKRouter takes random numbers"
    ):
        refuse_random_passes(build(config).train())


class Drawing(torch.nn.Module):
    def __init__(self, draw: Callable[[], object]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.draw()
        return hidden


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(1), random.random, np.random.rand], ids=["torch", "python", "numpy"]
)
def test_what_no_setting_names_is_found(draw: Callable[[], object]) -> None:
    model = build(Qwen3Config(**TINY))
    refuse_random_passes(model)
    model.model.layers[1].mlp.act_fn = Drawing(draw)
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state(legacy=False))
    with pytest.raises(
        RandomModelError, match=r"model\.layers\.1\.mlp\.act_fn, a Drawing takes random numbers"
    ):
        refuse_random_passes(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), repr(np.random.get_state(legacy=False))) == states[1:]


def random_settings() -> set[str]:
    """Every setting of transformers' causal language models that drops something or adds noise."""
    found = set()
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[family]()
        except StrictDataclassClassValidationError:
            continue  # it needs other models' configurations
        parts = [config, *(getattr(config, n, None) for n in ("attn_config", "ffn_config"))]
        for name, value in (item for part in parts if part for item in vars(part).items()):
            known = isinstance(value, (int, float)) or name == "moe_jitter_eps"  # None by default
            if known and ("drop" in name or "jitter" in name):
                found.add(name)
    # Of heads that a language model does not have.
    return {name for name in found if not name.startswith(("classifier", "summary"))}


def test_every_random_setting_of_transformers_is_refused() -> None:
    found = random_settings()
    assert {"router_jitter_noise", "input_jitter_noise", "layerdrop", "moe_jitter_eps"} <= found
    assert len(found) > 20
    model = build(Qwen3Config(**TINY)).train()
    before = dict(vars(model.model.config))
    for name in found:
        setattr(model.model.config, name, 0.25)
        with pytest.raises(RandomModelError, match=rf"config\.{name} is 0\.25"):
            check_not_random(model)
        model.model.config.__dict__ = dict(before)


def test_settings_of_a_part_are_refused() -> None:
    model = build(Qwen3Config(**TINY))
    model.model.config.attn_config = PreTrainedConfig(attn_pdrop=0.1)
    with pytest.raises(RandomModelError, match=r"config\.attn_config\.attn_pdrop is 0\.1"):
        check_not_random(model)


def test_training_refuses_it_before_it_samples(tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = build_tokenizer()
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, ffn_dim=32,
        num_attention_heads=2, dropout=0.0, layerdrop=0.1, word_embed_proj_dim=32,
    )  # fmt: skip
    folder = tmp_path / "model"
    build(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = Config.model_validate(
        {"model": str(folder), "output_dir": tmp_path / "run", "device": "cpu"}
    )
    with pytest.raises(UnsupportedModelError, match=r"config\.layerdrop is 0\.1, expected 0"):
        train(settings)
    assert not (tmp_path / "run").exists()
