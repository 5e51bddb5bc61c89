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
from selfdistill.training.gradients import StudentLoss, Totals, accumulate_gradients


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
