"""Weights and adapters of odd shapes, and weights that are no numbers any more."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import ParamWrapper
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from selfdistill.config import AdapterConfig, Config, VLLMSettings
from selfdistill.model.adapters import UnsupportedAdapterError, adapter_rank, attach_adapter
from selfdistill.model.folder import UnusableModelError
from selfdistill.model.sharding import UnshardableModelError, shard
from selfdistill.model.weights import TrainedWeights, load_model
from selfdistill.planning.estimates import ModelShape
from selfdistill.rollout.engine import EngineError, NotANumberError, SamplingParams, sample
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.rollout.vllm_engine import VLLMEngine
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.training.checkpoint import fingerprint
from selfdistill.training.loop import train
from selfdistill.training.solver import build_engine, load_solver

TOKENIZER = build_tokenizer()
TINY = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
}
APERTUS = ApertusConfig(**TINY, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
EXPERTS = {
    "qwen3_moe": Qwen3MoeConfig(
        **TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
    ),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2),
}
PROMPTS = [[1, 4, 9, 10, 5], [1, 4, 8, 5]]


def build(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def settings(model: Path, output: Path, **changes: Any) -> Config:
    return Config.model_validate(
        {
            "model": str(model),
            "output_dir": str(output),
            "device": "cpu",
            "task": {"step_counts": [1]},
            "method": {"name": "refsol", "group_size": 2},
            "steps": 2,
            "prompts_per_step": 2,
            "rollout": {"max_new_tokens": 4},
            "optimizer": {"warmup_steps": 0},
            "evaluation": {"problems": 2, "samples": 1, "every": 2},
            **changes,
        }
    )


def test_tensors_of_a_single_number_are_kept_and_resumed(tmp_path: Path) -> None:
    """They have no bytes to look at as they are, so a run ended at the fingerprint."""
    model = build(APERTUS)
    single = [tensor for tensor in model.state_dict().values() if tensor.dim() == 0]
    assert single
    before = fingerprint(model)
    single[0].add_(1.0)
    assert fingerprint(model) != before
    single[0].sub_(1.0)
    folder = save(model, tmp_path / "model")
    assert train(settings(folder, tmp_path / "run", steps=1)).step == 1
    assert train(settings(folder, tmp_path / "run"), resume=True).step == 2


def test_parameters_of_a_single_number_cannot_be_sharded() -> None:
    root = torch.nn.ModuleList([build(Qwen3Config(**TINY))])
    root[0].model.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(
        UnshardableModelError, match=r"0\.model\.scale is a single number.*shard: f"
    ):
        shard(root, [root[0]], compute_dtype=torch.float32)


@pytest.mark.parametrize("family", EXPERTS)
def test_adapters_of_experts_are_what_they_are_said_to_be(family: str, tmp_path: Path) -> None:
    """peft doubles the rank of two layers in one parameter; vLLM was told the single one."""
    folder = save(build(EXPERTS[family]), tmp_path / "model")
    config = settings(
        folder,
        tmp_path / "run",
        adapter={"r": 3, "alpha": 6},
        rollout={"engine": {"name": "vllm"}},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft says that it ignores what it does
        student = load_model(config)
    ranks = {
        module.r["default"]
        for module in student.modules()
        if isinstance(module, ParamWrapper) and module.parameter_name != "weight"
    }
    assert ranks == {3, 6}
    assert adapter_rank(student) == 6
    engine = build_engine(config, student, TOKENIZER)  # does not start
    assert isinstance(engine, VLLMEngine)
    assert engine.adapter_rank == 6
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert ModelShape.of(EXPERTS[family], rank=3).adapters == trained


@pytest.mark.parametrize("family", EXPERTS)
def test_adapters_of_experts_come_back_and_can_be_turned_off(family: str, tmp_path: Path) -> None:
    folder = save(build(EXPERTS[family]), tmp_path / "model")
    config = settings(folder, tmp_path / "run", adapter={"r": 3})
    student = load_model(config)
    weights = TrainedWeights(student)
    torch.manual_seed(1)
    with torch.no_grad():
        for master in weights.masters.values():
            master.normal_(0.0, 0.3)
    (tmp_path / "saved").mkdir()
    weights.save(tmp_path / "saved")
    ids = torch.tensor(PROMPTS[:1])
    base = build(EXPERTS[family])(ids).logits
    expected = student(ids).logits
    assert (expected - base).abs().max() > 0.1
    assert torch.equal(load_model(config, tmp_path / "saved")(ids).logits, expected)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    other = PeftModel.from_pretrained(other, tmp_path / "saved").eval()
    assert torch.equal(other(ids).logits, expected)
    with student.disable_adapter():
        torch.testing.assert_close(student(ids).logits, base)


def test_an_adapter_for_layers_that_are_not_there_is_refused() -> None:
    """One name that fits was enough, and the others were left out without a word."""
    names = ("q_proj", "gate_proj", "up_proj", "down_proj")
    wanted = AdapterConfig(target_modules=(*names, "w9"))
    for config in (Qwen3Config(**TINY), EXPERTS["qwen3_moe"]):
        with pytest.raises(UnsupportedAdapterError, match=r"has no linear layer w9, expected"):
            attach_adapter(build(config), wanted, seed=0)
        attach_adapter(build(config), AdapterConfig(target_modules=names), seed=0)
    with pytest.raises(UnsupportedAdapterError, match=r"no linear layer down_proj, gate_proj, up_"):
        attach_adapter(build(EXPERTS["mixtral"]), wanted, seed=0)
    with pytest.raises(UnsupportedAdapterError, match=r"without also targeting gate_proj"):
        attach_adapter(
            build(EXPERTS["qwen3_moe"]), AdapterConfig(target_modules=("up_proj",)), seed=0
        )


def spoil(model: PreTrainedModel, value: float, *, at: int) -> None:
    """Make one logit of the second prompt such a number, from a token of the completion on."""

    def hook(module: object, args: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        hook.calls += 1
        if hook.calls > at:
            logits = logits.clone()
            logits[-1, -1, 7] = value
        return logits

    hook.calls = 0  # the prompt is read, then one call a token
    model.lm_head.register_forward_hook(hook)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 3])
def test_logits_that_are_no_numbers_stop_with_prompt_and_token(
    temperature: float, value: float, at: int
) -> None:
    """Sampling said that an index is out of bounds; taking the likeliest wrote token 0 for ever."""
    model = build(Qwen3Config(**TINY))
    model.lm_head.weight.data[TOKENIZER.eos_token_id] = 0.0
    model.generation_config.eos_token_id = None
    spoil(model, value, at=at)
    engine = TransformersEngine(model, TOKENIZER)
    params = SamplingParams(temperature=temperature, max_new_tokens=6)
    with pytest.raises(NotANumberError, match=r"prompt 1 of this call: .* token \d") as caught:
        engine.generate(PROMPTS, group_size=2, params=params)
    assert (caught.value.prompt, caught.value.token) == (1, at)
    with pytest.raises(NotANumberError, match=r"^step 3, problem 'b': the model's logits"):
        sample(
            engine,
            PROMPTS,
            group_size=2,
            params=params,
            names=["step 3, problem 'a'", "step 3, problem 'b'"],
        )


def test_banned_tokens_are_none_of_that() -> None:
    model = build(Qwen3Config(**TINY))
    spoil(model, -float("inf"), at=0)
    groups = TransformersEngine(model, TOKENIZER).generate(
        PROMPTS, group_size=2, params=SamplingParams(max_new_tokens=6)
    )
    assert all(len(group) == 2 for group in groups)


def test_vllm_does_not_go_on_with_some_token(tmp_path: Path, monkeypatch: Any) -> None:
    engine = VLLMEngine(str(save(build(Qwen3Config(**TINY)), tmp_path)), TOKENIZER, VLLMSettings())
    logprobs = [{5: SimpleNamespace(logprob=value)} for value in (-1.0, float("nan"))]
    good = SimpleNamespace(token_ids=[5, 5], logprobs=[logprobs[0]] * 2)
    bad = SimpleNamespace(token_ids=[5, 5], logprobs=logprobs)
    outputs = [SimpleNamespace(outputs=[output]) for output in (good, good, good, bad)]
    fake = SimpleNamespace(generate=lambda *args, **kwargs: outputs)
    monkeypatch.setitem(engine.__dict__, "_llm", fake)
    stub = SimpleNamespace(SamplingParams=lambda **kwargs: kwargs)
    monkeypatch.setitem(__import__("sys").modules, "vllm", stub)
    with pytest.raises(NotANumberError) as caught:
        engine.generate(PROMPTS, group_size=2, params=SamplingParams(max_new_tokens=2))
    assert (caught.value.prompt, caught.value.token) == (1, 1)


def test_a_run_names_step_and_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(build(Qwen3Config(**TINY)), tmp_path / "model")
    config = settings(folder, tmp_path / "run", steps=1)
    calls = count_generate(monkeypatch)
    first = load_solver(config).task.problems(split="train", count=1, seed=config.seed)[0]
    with pytest.raises(EngineError, match=rf"step 1, problem {re.escape(repr(first.id))}: "):
        train(config)
    assert calls[0] >= 2


def count_generate(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every logit after the first evaluation be NaN."""
    calls = [0]
    generate: Callable[..., Any] = TransformersEngine.generate

    def counted(self: TransformersEngine, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            self.model.lm_head.register_forward_hook(lambda m, a, logits: logits * float("nan"))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    return calls


def test_weights_that_are_no_numbers_are_found_when_they_are_loaded(tmp_path: Path) -> None:
    model = build(Qwen3Config(**TINY))
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).data[0, 0] = float("nan")
    folder = save(model, tmp_path / "model")
    with pytest.raises(UnusableModelError, match=rf"NaN in {re.escape(name)}, expected numbers"):
        load_solver(settings(folder, tmp_path / "run"))
