"""torch's counter of operations sees the products of the fused operators."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import selfdistill_kernels.flops  # noqa: F401  the counter learns of the operators
from selfdistill_kernels import (
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
)

N, H, V = 6, 8, 50
PRODUCT = 2 * N * H * V


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call().backward()
    return counter.get_total_flops()


def tensors(frozen: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H)
    return hidden, torch.randn(N, H), weight.requires_grad_(not frozen), torch.randint(0, V, (N,))


@pytest.mark.parametrize("frozen", [True, False])
def test_products_of_losses(frozen: bool) -> None:
    hidden, teacher, weight, targets = tensors(frozen)
    gradients = 1 if frozen else 2
    loss = counted(lambda: fused_linear_distillation(hidden, teacher, weight).loss)
    assert loss == (2 + gradients) * PRODUCT
    twice = counted(
        lambda: fused_linear_distillation(hidden, teacher, weight, reduction="none").loss.sum()
    )
    assert twice == (2 + 2 + gradients) * PRODUCT
    logprobs = counted(lambda: fused_linear_logprobs(hidden, weight, targets).logprobs.sum())
    assert logprobs == (1 + 1 + gradients) * PRODUCT


def test_a_head_of_the_teachers_own() -> None:
    hidden, _, weight, _ = tensors(frozen=True)
    loss = counted(
        lambda: (
            fused_linear_distillation(
                hidden, torch.randn(N, 3 * H), weight, teacher_weight=torch.randn(V, 3 * H)
            ).loss
        )
    )
    assert loss == (1 + 3 + 1) * PRODUCT


def test_logits_are_counted_where_they_are_made() -> None:
    hidden, teacher, weight, _ = tensors(frozen=True)
    loss = counted(lambda: distillation_from_logits(hidden @ weight.T, teacher @ weight.T).loss)
    assert loss == 3 * PRODUCT
