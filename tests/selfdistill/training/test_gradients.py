from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from exactness import assert_no_worse_than_torch
from padded_step import in_float64
from torch import Tensor
from transformers import LlamaForCausalLM

from selfdistill.config import LossConfig
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.teacher import BaseTeacher
from selfdistill.training.gradients import (
    StudentLoss,
    Totals,
    accumulate_gradients,
    clip_gradients,
)


@pytest.mark.parametrize(
    "loss",
    [
        {"objective": {"name": "forward_kl"}},
        {"objective": {"name": "reverse_kl"}},
        {"objective": {"name": "jsd"}},
        {"advantage_mask": {"top_fraction": 0.3}},
        {"advantage_mask": {"threshold": 0.001, "per_step": True}},
        {"reduction": "sequence_mean"},
    ],
    ids=str,
)
def test_accumulated_gradients_equal_the_whole_batch(
    make_model: Callable[..., LlamaForCausalLM],
    ragged_groups: list[PromptGroup],
    loss: dict[str, Any],
) -> None:
    config = LossConfig.model_validate({"advantage_mask": {"threshold": 0.001}, **loss})
    groups = [
        replace(group, steps=[[i // 3 for i in range(len(c))] for c in group.completions])
        for group in [*ragged_groups, ragged_groups[0]]
    ]

    def accumulated(
        student: LlamaForCausalLM, *, tokens_per_pass: int
    ) -> tuple[Totals, dict[str, Tensor]]:
        teacher = BaseTeacher(copy.deepcopy(student))
        totals = accumulate_gradients(
            StudentLoss(
                student, teacher, DistillationLoss(config), lm_heads=find_lm_heads(student, teacher)
            ),
            groups,
            tokens_per_pass=tokens_per_pass,
        )
        sums = torch.tensor([totals.loss, totals.kl], dtype=torch.float64)
        found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        return totals, {"loss and kl": sums, **found}

    # The measure is the whole batch in one pass: torch's operations, and a loss that
    # tests/selfdistill_kernels holds against plain torch.
    totals, whole = accumulated(make_model(), tokens_per_pass=10_000)
    _, exact = accumulated(in_float64(make_model()), tokens_per_pass=10_000)
    for tokens_per_pass in (1, 120):
        other_totals, other = accumulated(make_model(), tokens_per_pass=tokens_per_pass)
        assert other_totals.active == totals.active
        assert_no_worse_than_torch("sums over passes", other, whole, exact)


def test_the_norm_of_a_large_gradient_is_right_and_small_ones_have_the_bits_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(2**12, 2**12)), torch.nn.Parameter(torch.zeros(5))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    expected = torch.cat([p.grad.flatten() for p in parameters]).double().norm().item()
    before = [parameter.grad.clone() for parameter in parameters]
    # A part of 2**20 elements is off by 1e-5, and all of them at once by 6e-4.
    assert clip_gradients(parameters, max_norm=1.0).item() == pytest.approx(expected, rel=3e-5)
    for parameter, gradient in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient / expected, rtol=4e-5, atol=0)

    small, alike = ([torch.nn.Parameter(torch.zeros(64, 64)) for _ in range(3)] for _ in range(2))
    for one, other in zip(small, alike, strict=True):
        one.grad = torch.randn(64, 64, generator=generator)
        other.grad = one.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(alike, 2.0)
    assert torch.equal(
        clip_gradients([*small, torch.nn.Parameter(torch.ones(1))], max_norm=2.0), norm
    )
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(small, alike, strict=True))
