"""The host never waits for the device on the way to a backend.

Meta tensors stand for those of a GPU: they take the same branches (their device is not the CPU),
and every operation that reads a value back (`item`, `nonzero`, indexing by a mask) raises on them.
"""

from __future__ import annotations

import pytest
import torch

from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
    ops,
    passes,
)
from selfdistill_kernels.backends.interface import Gradients
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.statistics import Column
from selfdistill_kernels.token_loss import active_tokens, term_weights_of

TOKENS, HIDDEN, VOCABULARY = 6, 8, 31
EVERYTHING = Objective(
    "jsd", policy_gradient=0.1, cross_entropy=0.2, entropy=0.3, divergence_clip=2.0,
    importance_clip=3.0,
)  # fmt: skip
MASKS = [
    None,
    AdvantageMask(0.5, "negative"),
    AdvantageMask(top_fraction=0.2),
    AdvantageMask(0.1, per_step=True),
]


def meta(*shape, dtype=torch.bfloat16, requires_grad=False):
    return torch.empty(shape, device="meta", dtype=dtype, requires_grad=requires_grad)


def inputs():
    """Student, teacher, head, targets in [batch, time]."""
    return (
        meta(2, 3, HIDDEN, requires_grad=True),
        meta(2, 3, HIDDEN),
        meta(VOCABULARY, HIDDEN, requires_grad=True),
        meta(2, 3, dtype=torch.int64),
    )


def per_token(mask):
    return {
        "mask": meta(2, 3, dtype=torch.bool),
        "token_weight": meta(2, 3, dtype=torch.float32),
        "old_logprobs": meta(2, 3, dtype=torch.float32),
        "step_ids": meta(2, 3, dtype=torch.int64) if mask is not None and mask.per_step else None,
    }


@pytest.fixture(autouse=True)
def values_are_refused():
    """What the tests stand on: reading a value of these tensors raises."""
    reads = (
        lambda tensor: tensor.sum().item(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor],
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor.cpu(),
    )
    for read in reads:
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(meta(3, dtype=torch.bool))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean", "none"])
def test_the_loss_and_its_backward_pass(reduction, mask):
    student, teacher, weight, targets = inputs()
    out = fused_linear_distillation(
        student, teacher, weight, targets, objective=EVERYTHING, advantage_mask=mask,
        reduction=reduction, normalizer=meta(dtype=torch.float32), **per_token(mask),
    )  # fmt: skip
    out.loss.sum().backward()
    assert student.grad.shape == student.shape
    assert weight.grad.shape == weight.shape


def test_logprobs_and_ready_made_logits():
    student, _, weight, targets = inputs()
    fused_linear_logprobs(student, weight, targets).logprobs.sum().backward()
    assert weight.grad.shape == weight.shape
    logits = meta(2, 3, VOCABULARY, requires_grad=True)
    distillation_from_logits(logits, logits.detach(), targets).loss.backward()
    assert logits.grad.shape == logits.shape


class Device:
    """A backend that works as on a device: shapes are known, values are not."""

    def statistics(self, inputs, objective, workspace):
        return meta(inputs.student_hidden.shape[0], len(Column), dtype=torch.float32)

    def gradient(
        self, inputs, objective, statistics, term_weights, needs, workspace,
        entries=None, rounding=None,
    ):  # fmt: skip
        return Gradients(
            torch.empty_like(inputs.student_hidden), torch.empty_like(inputs.weight), None
        )

    def visit(
        self, inputs, objective, gate, loss_weight, old_logprobs, needs, workspace, rounding=None
    ):
        statistics = self.statistics(inputs, objective, workspace)
        active = active_tokens(statistics, loss_weight, inputs.exists, gate)
        weights = term_weights_of(objective, statistics, loss_weight * active, old_logprobs)
        return (
            statistics,
            active,
            self.gradient(inputs, objective, statistics, weights, needs, workspace),
        )


@pytest.fixture
def operators(monkeypatch):
    """What the operators run on a device: on meta tensors torch would take their fake kernels."""
    monkeypatch.setattr(passes, "get_backend", lambda name: Device())
    return {
        operator: operator._init_fn
        for operator in (ops.linear_loss, ops.linear_statistics, ops.linear_statistics_backward)
    }


def flat_tensors():
    student, teacher, weight = meta(6, HIDDEN), meta(6, HIDDEN), meta(VOCABULARY, HIDDEN)
    exists = meta(6, dtype=torch.bool)
    return student, teacher, weight, None, None, None, meta(6, dtype=torch.int64), exists


@pytest.mark.parametrize("gate", [None, -1])
def test_the_loss_operator(operators, gate):
    weight = old = meta(6, dtype=torch.float32)
    terms = ("jsd", 0.5, 0.1, 0.2, 0.3, 2.0, 3.0, None)
    loss, statistics, active, *_ = operators[ops.linear_loss](
        *flat_tensors(),
        weight,
        old,
        1.0,
        None,
        1.0,
        *terms,
        gate,
        0.1,
        None,
        0,
        None,
        True,
        True,
        False,
        0,
        "",
    )
    assert loss.shape == ()
    assert statistics.shape == (6, len(Column))
    assert active.dtype == torch.bool


def test_the_statistics_operators(operators):
    options = (1.0, None, 1.0, "jsd", 0.5, None)
    statistics, support, logprobs = operators[ops.linear_statistics](
        *flat_tensors(), *options, 0, "student", True, 0, ""
    )
    weights = meta(6, 3, dtype=torch.float32)
    hidden, weight, _ = operators[ops.linear_statistics_backward](
        *flat_tensors(),
        statistics,
        support,
        logprobs,
        weights,
        *options,
        True,
        True,
        True,
        False,
        0,
        "",
    )
    assert hidden.shape == (6, HIDDEN)
    assert weight.shape == (VOCABULARY, HIDDEN)


def test_the_device_checks_the_targets_by_itself(monkeypatch):
    """On the CPU the same check is an error with the token id (test_arguments.py)."""
    asked = []
    monkeypatch.setattr(torch, "_assert_async", lambda *arguments: asked.append(arguments))
    passes.linear_inputs(*flat_tensors(), LogitTransform())
    ((valid, message),) = asked
    assert valid.shape == ()
    assert "targets" in message
