from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from selfdistill.teacher import BaseTeacher, LiveTeacher

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
