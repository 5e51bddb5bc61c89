from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from selfdistill.model.following_teacher import EmaTeacher, RefreshedTeacher
from selfdistill.model.layout import PromptGroup
from selfdistill.model.scoring import score
from selfdistill.model.teacher import BaseTeacher, LiveTeacher

IDS = torch.tensor([[5, 6, 7]])


def test_live_is_the_student(tiny_model: Callable[..., PreTrainedModel]) -> None:
    student = tiny_model("llama")
    with LiveTeacher().weights(student) as teacher:
        assert teacher is student
    assert LiveTeacher.has_student_weights


def test_base_is_a_frozen_copy(tiny_model: Callable[..., PreTrainedModel]) -> None:
    student = tiny_model("llama")
    frozen = copy.deepcopy(student)
    with BaseTeacher(frozen).weights(student) as teacher:
        assert teacher is frozen
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not BaseTeacher.has_student_weights


def test_base_turns_adapters_off_and_on_again(tiny_model: Callable[..., PreTrainedModel]) -> None:
    base = tiny_model("llama").eval()
    expected = copy.deepcopy(base)(IDS).logits
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    student = get_peft_model(base, config).eval()
    adapted = student(IDS).logits
    with BaseTeacher().weights(student) as teacher:
        # The same products of the same shapes, in memory that torch aligns alike.
        torch.testing.assert_close(teacher(IDS).logits, expected)
    torch.testing.assert_close(student(IDS).logits, adapted)
    assert (adapted - expected).abs().max() > 0.1
    assert any(parameter.requires_grad for parameter in student.parameters())


def test_base_needs_base_weights(tiny_model: Callable[..., PreTrainedModel]) -> None:
    student = tiny_model("llama")
    with pytest.raises(ValueError, match="without PEFT adapters"):
        BaseTeacher().weights(student)
    with pytest.raises(ValueError, match="model is the student itself"):
        BaseTeacher(student).weights(student)


def test_ema_follows_the_float32_weights(tiny_model: Callable[..., PreTrainedModel]) -> None:
    student = tiny_model("llama").to(torch.bfloat16)
    teacher = EmaTeacher(student, decay=0.9)
    start = {name: value.clone() for name, value in teacher.state.items()}
    masters = {name: value + 1e-4 for name, value in start.items()}  # lost in bfloat16
    for _ in range(2):
        teacher.update(masters)
    for name, value in teacher.state.items():
        assert value.dtype == torch.float32
        # Two averages of three operations, each rounded by 6e-8 of a weight.
        torch.testing.assert_close(value, start[name] + 0.19e-4, rtol=1e-6, atol=1e-8)
    with teacher.weights(student) as model:
        weight = model.get_parameter("lm_head.weight")
        assert torch.equal(weight, teacher.state["lm_head.weight"].bfloat16())
    assert student.get_parameter("lm_head.weight") is not weight
    # Held in the model itself, nothing is rounded any more.
    teacher.hold_float32()
    teacher.update(masters)
    with teacher.weights(student) as model:
        assert all(torch.equal(model.get_parameter(n), teacher.state[n]) for n in start)
    torch.testing.assert_close(
        teacher.state["lm_head.weight"], start["lm_head.weight"] + 0.271e-4, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("own_frozen", [False, True])
def test_an_average_of_adapters_reads_the_students_frozen_weights(
    tiny_model: Callable[..., PreTrainedModel], own_frozen: bool
) -> None:
    student = get_peft_model(tiny_model("qwen3"), LoraConfig(r=2, target_modules="all-linear"))
    teacher = EmaTeacher(student, decay=0.9, own_frozen=own_frozen)
    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    assert teacher.state.keys() == learning
    for name, parameter in teacher.model.named_parameters():
        same = parameter is student.get_parameter(name)
        assert same == (name not in learning and not own_frozen), name
        assert not parameter.requires_grad
    assert all(student.get_parameter(name).requires_grad for name in learning)
    embeddings = teacher.model.get_input_embeddings().weight
    assert teacher.model.get_output_embeddings().weight is embeddings


def test_an_average_may_not_borrow_the_students_prefix(
    tiny_model: Callable[..., PreTrainedModel], ragged_groups: list[PromptGroup]
) -> None:
    student = tiny_model("llama")
    read, lent = (
        score(student, teacher, ragged_groups).statistics.packed_tokens
        for teacher in (EmaTeacher(student, decay=0.9), LiveTeacher())
    )
    assert read == lent + 9 + 4  # what student and teacher begin with, of both groups


def test_a_refreshed_teacher_is_the_student_of_the_last_refresh(
    tiny_model: Callable[..., PreTrainedModel],
) -> None:
    student = tiny_model("llama").to(torch.bfloat16)
    teacher = RefreshedTeacher(student)
    start = {name: value.clone() for name, value in teacher.state.items()}
    masters = {name: value + 1e-4 for name, value in start.items()}  # lost in bfloat16
    teacher.update(masters)
    assert all(torch.equal(value, start[name]) for name, value in teacher.state.items())
    teacher.refresh(masters)
    assert all(torch.equal(value, masters[name]) for name, value in teacher.state.items())
    with teacher.weights(student) as model:
        weight = model.get_parameter("lm_head.weight")
        assert torch.equal(weight, masters["lm_head.weight"].bfloat16())
    assert student.get_parameter("lm_head.weight") is not weight
    assert masters["lm_head.weight"].data_ptr() != teacher.state["lm_head.weight"].data_ptr()


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_ema_decay_lies_between_0_and_1(
    tiny_model: Callable[..., PreTrainedModel], decay: float
) -> None:
    with pytest.raises(ValueError, match=f"decay is {decay}, expected a number between 0 and 1"):
        EmaTeacher(tiny_model("llama"), decay=decay)
