from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from selfdistill.config import LossConfig
from selfdistill.gradients import StudentLoss, accumulate_gradients
from selfdistill.layout import PromptGroup
from selfdistill.methods.loss import DistillationLoss, find_heads
from selfdistill.teacher import BaseTeacher


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
    results = []
    for tokens_per_pass in (1, 120, 10_000):
        student = make_model()
        teacher = BaseTeacher(copy.deepcopy(student))
        heads = find_heads(student, teacher)
        totals = accumulate_gradients(
            StudentLoss(student, teacher, DistillationLoss(config), heads=heads),
            groups,
            tokens_per_pass=tokens_per_pass,
        )
        results.append((totals, {n: p.grad for n, p in student.named_parameters()}))
    totals, gradients = results[-1]
    for other_totals, other in results[:-1]:
        assert other_totals.loss == pytest.approx(totals.loss, rel=1e-6)
        assert other_totals.kl == pytest.approx(totals.kl, rel=1e-6)
        assert other_totals.active == totals.active
        for name, gradient in gradients.items():
            assert gradient is not None
            error = (other[name] - gradient).norm() / gradient.norm()
            assert error < 5e-6, name
