"""The modules with Liger's signatures beside Liger's own (plain torch, chunked) and its formula."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from host_models import assert_close
from torch import Tensor, nn

from selfdistill_kernels.integrations import liger

N, H, V = 12, 16, 97


def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(0, V, (N,), generator=generator)
    labels[::5] = -100
    return {
        "student_input": randn(N, H), "student_weight": randn(V, H),
        "teacher_input": randn(N, 2 * H), "teacher_weight": randn(V, 2 * H), "labels": labels,
        "student_bias": randn(V), "teacher_bias": randn(V),
    }  # fmt: skip


def run(module: Any, *biases: str) -> tuple[Any, dict[str, Tensor]]:
    """What the module returns, and the gradients of twice its loss."""
    tensors = problem()
    learned = {
        name: tensors[name].requires_grad_()
        for name in ("student_input", "student_weight", "student_bias")
        if not name.endswith("bias") or name in biases
    }
    names = ["student_input", "student_weight", "teacher_input", "teacher_weight", "labels"]
    output = module(*(tensors[name] for name in [*names, *biases]))
    loss = output[0] if isinstance(output, tuple) else output
    (2.0 * loss).backward()
    return output, {name: tensor.grad for name, tensor in learned.items()}


@pytest.mark.parametrize("biases", [(), ("student_bias", "teacher_bias")])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.0, "temperature": 2.0},
        {"beta": 1.0, "weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "temperature": 0.7},
        {"beta": 0.3, "weight_hard_loss": 0.9, "weight_soft_loss": 0.2},
        {"weight_hard_loss": 1.0, "weight_soft_loss": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [False, True])
def test_chunked_jsd_loss(options: dict[str, float], biases: tuple[str, ...], parts: bool) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    options = {**options, "return_soft_hard_loss": parts}
    theirs, expected = run(LigerFusedLinearJSDLoss(**options, compiled=False), *biases)
    ours, found = run(liger.LigerFusedLinearJSDLoss(**options), *biases)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_close(found, expected)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jsd(beta: float) -> None:
    """Liger's own is Triton; its formula in plain torch is what `LigerFusedLinearJSDLoss` has."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    soft = LigerFusedLinearJSDLoss(0.0, 1.0, beta, temperature=0.8, compiled=False)
    theirs, expected = run(soft)
    ours, found = run(liger.LigerFusedLinearJSD(beta, temperature=0.8))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert_close(found, expected)


def test_signatures_are_ligers() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    from liger_kernel.transformers import LigerFusedLinearJSD

    def names(module: type[nn.Module]) -> list[list[tuple[str, Any]]]:
        return [
            [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
            for function in (module.__init__, module.forward)
        ]

    assert names(liger.LigerFusedLinearJSDLoss) == names(LigerFusedLinearJSDLoss)
    ours, theirs = names(liger.LigerFusedLinearJSD), names(LigerFusedLinearJSD)
    assert ours[0] == theirs[0]
    assert [name for name, _ in ours[1]] == [name for name, _ in theirs[1]]


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match="weight_hard_loss, weight_soft_loss: expected numbers"):
        liger.LigerFusedLinearJSDLoss(weight_hard_loss=-1.0)
    with pytest.raises(ValueError, match=r"accum_dtype: expected None or torch.float32"):
        liger.LigerFusedLinearJSD(accum_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        run(liger.LigerFusedLinearJSD(temperature=0.0))
