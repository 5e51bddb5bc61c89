from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import assert_no_worse_than_torch
from padded_step import forward_kl, in_float64, padded_two_pass, step_results
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from selfdistill.config import AdapterConfig, Config, LossConfig
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.model.adapters import attach_adapter
from selfdistill.model.following_teacher import EmaTeacher
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.randomness import enable_activation_checkpointing
from selfdistill.model.scoring import score
from selfdistill.model.teacher import BaseTeacher, LiveTeacher, Teacher
from selfdistill.model.weights import TrainedWeights, copy_tensors, load_model
from selfdistill.training.gradients import StudentLoss, accumulate_gradients
from selfdistill_kernels.backends.interface import Needs

ModelFactory = Callable[..., PreTrainedModel]
IDS = torch.tensor([[5, 6, 7]])


def make_config(model: Path, **changes: Any) -> Config:
    return Config.model_validate({"model": str(model), "output_dir": "run", **changes})


def with_adapter(model: PreTrainedModel, **changes: Any) -> PeftModel:
    student = attach_adapter(model, AdapterConfig(r=3, alpha=6, **changes), seed=1)
    torch.manual_seed(5)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:  # a trained adapter: its start is 0
            parameter.data.normal_(0, 0.1)
    return student


def gradients(
    student: Any, teacher: Teacher, groups: list[PromptGroup], *, tokens_per_pass: int = 10_000
) -> dict[str, torch.Tensor]:
    weights = TrainedWeights(student)
    accumulate_gradients(
        StudentLoss(
            student,
            teacher,
            DistillationLoss(LossConfig()),
            lm_heads=find_lm_heads(student, teacher),
        ),
        groups,
        tokens_per_pass=tokens_per_pass,
    )
    found = {}
    for name, master in weights.masters.items():
        assert master.grad is not None, name
        assert master.grad.dtype == torch.float32
        found[name] = master.grad
    return found


def relative_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert got.keys() == expected.keys()
    difference = sum((got[n] - expected[n]).square().sum() for n in expected)
    return float((difference / sum(g.square().sum() for g in expected.values())) ** 0.5)


def test_a_frozen_head_costs_no_gradient(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Recorded(Needs):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            asked.append(self)

    monkeypatch.setattr("selfdistill_kernels.arguments.preparation.Needs", Recorded)
    student = with_adapter(tiny_model("llama"))
    head = student.get_output_embeddings().weight
    gradients(student, BaseTeacher(), ragged_groups)
    assert not head.requires_grad
    assert head.grad is None
    assert any(needs.hidden for needs in asked)
    assert not any(needs.weight or needs.bias for needs in asked)


def test_the_base_model_and_the_student_with_adapters_share_one_head(
    tiny_model: ModelFactory,
) -> None:
    student = with_adapter(tiny_model("llama"))
    for teacher in (BaseTeacher(), LiveTeacher(), EmaTeacher(student, decay=0.5)):
        own, theirs = find_lm_heads(student, teacher)
        assert own.weight is theirs.weight


@pytest.mark.parametrize("tied", ["qwen3", "llama"])
def test_adapter_gradients_are_those_of_the_merged_weights(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], tied: str
) -> None:
    """dA = alpha/r B^T dW and dB = alpha/r dW A^T, with dW from full fine-tuning of W + BA."""

    def plain(student: PeftModel, base: PreTrainedModel) -> dict[str, torch.Tensor]:
        merged = copy.deepcopy(student).merge_and_unload().requires_grad_(True)
        _, full = step_results(merged, *padded_two_pass(merged, base, ragged_groups))
        expected = {}
        for name, parameter in student.named_parameters():
            if "lora_A" not in name:
                continue
            other = name.replace("lora_A", "lora_B")
            layer = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
            b = student.get_parameter(other).detach()
            expected[name] = 2 * b.T @ full[layer]
            expected[other] = 2 * full[layer] @ parameter.detach().T
        return expected

    student, base = with_adapter(tiny_model(tied)), tiny_model(tied)
    torchs, exact = plain(student, base), plain(in_float64(student), in_float64(base))
    got = gradients(student, BaseTeacher(), ragged_groups)
    assert_no_worse_than_torch("adapter gradients", got, torchs, exact)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", ["base", "live", "ema"])
def test_activation_checkpointing_changes_no_number(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], adapter: bool, name: str
) -> None:
    results = []
    for checkpointed in (False, True):
        student: Any = tiny_model("llama").eval()
        if adapter:
            student = with_adapter(student).eval()
        teacher: Teacher
        if name == "live":
            teacher = LiveTeacher()
        elif name == "ema":
            teacher = EmaTeacher(student, decay=0.5)
        else:
            teacher = BaseTeacher() if adapter else BaseTeacher(tiny_model("llama", seed=1))
        if checkpointed:
            enable_activation_checkpointing(student)
        saved = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            results.append((gradients(student, teacher, ragged_groups), saved))
    (plain, plain_saved), (recomputed, recomputed_saved) = results
    assert all(torch.equal(plain[n], recomputed[n]) for n in plain)
    assert recomputed_saved < 0.7 * plain_saved


@pytest.mark.parametrize("adapter", [False, True])
def test_bfloat16_gradients_add_up_in_float32(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], adapter: bool
) -> None:
    def student(dtype: torch.dtype) -> Any:
        model = tiny_model("llama").to(dtype)
        return with_adapter(model).eval() if adapter else model.eval()

    groups = [*ragged_groups, *ragged_groups]
    padded = student(torch.bfloat16)
    hidden, target = padded_two_pass(padded, padded, groups)
    forward_kl(padded, hidden, target).backward()
    half = student(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    got = gradients(half, LiveTeacher(), groups, tokens_per_pass=1)
    assert all(parameter.grad is None for parameter in half.parameters())
    exact = student(torch.bfloat16).float()
    expected = gradients(exact, LiveTeacher(), groups)
    learning = [p for p in padded.parameters() if p.requires_grad]
    usual = dict(zip(expected, (p.grad for p in learning), strict=True))
    assert relative_error(got, expected) < 1.5 * relative_error(usual, expected)
    # A sum of bfloat16 numbers needs more than the eight bits of one of them.
    sums = torch.cat([g.flatten() for g in got.values()])
    assert (sums.bfloat16().float() != sums).float().mean() > 0.5


def test_small_updates_reach_bfloat16_weights_in_the_end(tiny_model: ModelFactory) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    weights = TrainedWeights(model)
    optimizer = torch.optim.SGD(weights.masters.values(), lr=1e-4)
    parameter, master = model.lm_head.weight, weights.masters["lm_head.weight"]
    before = parameter.detach().clone()
    # Each update is below half of bfloat16's spacing at 1, a hundred of them are not.
    with torch.no_grad():
        master.fill_(1.0)
    for step in range(100):
        for other in weights.masters.values():
            other.grad = torch.ones_like(other)
        optimizer.step()
        weights.publish()
        if step == 0:
            assert torch.equal(parameter, torch.ones_like(parameter))
    assert not torch.equal(parameter, before)
    # A hundred differences near 1, each rounded by 6e-8 or less: 6e-6 at the worst.
    torch.testing.assert_close(master, torch.full_like(master, 0.99), rtol=0, atol=1e-5)
    assert torch.equal(parameter, master.bfloat16())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [None, {"r": 3}])
def test_saved_weights_come_back_as_they_were(
    tiny_model: ModelFactory, tmp_path: Path, precision: str, adapter: dict[str, Any] | None
) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path / "base")
    config = make_config(tmp_path / "base", precision=precision, adapter=adapter)
    model = load_model(config)
    weights = TrainedWeights(model)
    torch.manual_seed(2)
    with torch.no_grad():
        for master in weights.masters.values():
            master.add_(torch.randn_like(master), alpha=0.1)
    weights.publish()
    (tmp_path / "saved").mkdir()
    weights.save(tmp_path / "saved")

    fresh = TrainedWeights(load_model(config))
    copy_tensors(fresh.read(tmp_path / "saved"), fresh.masters)
    fresh.publish()
    assert fresh.masters.keys() == weights.masters.keys()
    assert all(torch.equal(fresh.masters[n], weights.masters[n]) for n in weights.masters)
    expected = model(IDS).logits
    assert torch.equal(fresh.model(IDS).logits, expected)
    assert torch.equal(load_model(config, tmp_path / "saved")(IDS).logits, expected)
    # Other programs read it, too.
    base = tmp_path / "saved" if adapter is None else tmp_path / "base"
    other = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, precision))
    if adapter is not None:
        size = sum(path.stat().st_size for path in (tmp_path / "saved").iterdir())
        assert size < (tmp_path / "base" / "model.safetensors").stat().st_size
        other = PeftModel.from_pretrained(other, tmp_path / "saved", autocast_adapter_dtype=False)
        for parameter in other.parameters():  # not the buffers: rotary frequencies stay float32
            parameter.data = parameter.data.to(getattr(torch, precision))
    assert torch.equal(other.eval()(IDS).logits, expected)


def test_an_ema_teacher_scores_with_the_average(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student = tiny_model("qwen3")  # tied: one parameter in two modules
    teacher = EmaTeacher(student, decay=0.75)
    weights = TrainedWeights(student)
    average = copy.deepcopy(student)
    torch.manual_seed(3)
    for _ in range(3):
        with torch.no_grad():
            for name, master in weights.masters.items():
                master.add_(torch.randn_like(master), alpha=0.05)
                parameter = average.get_parameter(name)
                parameter.copy_(0.75 * parameter + 0.25 * master)
        teacher.update(weights.masters)
    torchs, exact = (
        step_results(own, *padded_two_pass(own, other, ragged_groups), teacher=other)
        for own, other in ((copy.deepcopy(student), average), map(in_float64, (student, average)))
    )
    scored = score(student, teacher, ragged_groups)
    assert_no_worse_than_torch(
        "hidden states", scored.teacher_hidden, torchs[0]["teacher"], exact[0]["teacher"]
    )
    live = score(student, LiveTeacher(), ragged_groups)
    assert (scored.teacher_hidden - live.teacher_hidden).abs().max() > 1e-3
    _, head = find_lm_heads(student, teacher)
    # Three times two products and a sum, each rounded by 6e-8.
    torch.testing.assert_close(
        head.weight, average.get_output_embeddings().weight, rtol=1e-6, atol=1e-6
    )
    assert not head.weight.requires_grad
    # The exchange leaves the student's own pass alone: its gradients are the same.
    got = gradients(student, teacher, ragged_groups)
    assert_no_worse_than_torch("gradients", got, torchs[1], exact[1])
    assert all(a is b for a, b in zip(weights.masters.values(), student.parameters(), strict=True))
