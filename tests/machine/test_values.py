"""Values and gradients that the machine code of gfx942 and gfx950 computes, against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from amd_machine.execute import Schedule
from amd_machine.launch import Machine
from clip_cases import clipped_rows
from kernel_cases import DIVERGENCES, check_against_torch, make_case, materialised_losses
from slow import slow_but
from triton_case import check

from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    distillation_from_logits,
    fused_linear_logprobs,
)

ARCHITECTURES = ("gfx942", "gfx950")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CAPPED = {"logit_scale": 1.7, "softcap": 6.0, "temperature": 1.3}
GATE = AdvantageMask(0.05)
# Beside each other in one problem: the terms of the loss, two heads, a bias, a soft cap, a mask
# whose rows hold NaN, and sizes that end within a tile. Every pair occurs with some dtype.
PROBLEMS = {
    "plain": {},
    "two heads": {"teacher_hidden": 40, "bias": True},
    "capped": CAPPED,
}
FAST = [("forward_kl", "bf16", "gfx942"), ("jsd", "fp16", "gfx950")]


def problem_of(divergence: str, dtype: str) -> str:
    """Which problem a divergence meets in which dtype: a Latin square."""
    number = DIVERGENCES.index(divergence) + list(DTYPES).index(dtype)
    return list(PROBLEMS)[number % len(PROBLEMS)]


@pytest.mark.parametrize("gate", [None, GATE], ids=["store", "recompute"])
@pytest.mark.parametrize(
    ("divergence", "dtype", "architecture"),
    slow_but(FAST, product(DIVERGENCES, DTYPES, ARCHITECTURES)),
)
def test_values_and_gradients(on_machine, divergence, dtype, architecture, gate):
    machine = Machine(architecture, Schedule(seed=1))
    on_machine(machine)
    name = problem_of(divergence, dtype)
    case = make_case(17, 56, 150, seed=3, **PROBLEMS[name])
    objective = Objective(divergence, 0.3, policy_gradient=0.3, cross_entropy=0.2, entropy=-0.1)
    mask = torch.arange(17) % 4 != 1
    # Unrelated heads: as in tests/triton/test_values.py.
    roundings = 48 if name == "two heads" else 8
    check(case, objective, DTYPES[dtype], mask=mask, advantage_mask=gate, roundings=roundings)
    ran = {launch.compiled.job.name for launch in machine.launched}
    expected = {"sweep", "gradient", "product"} if gate else {"row_statistics", "row_gradient"}
    assert expected <= ran


@pytest.mark.parametrize("gate", [None, GATE], ids=["store", "recompute"])
@pytest.mark.parametrize(
    ("divergence", "architecture"),
    slow_but([("forward_kl", "gfx942")], product(DIVERGENCES, ARCHITECTURES)),
)
def test_clipped_entries(on_machine, divergence, architecture, gate):
    on_machine(Machine(architecture, Schedule(seed=4)))
    case = make_case(9, 24, 150, seed=3, closeness=0.3)
    objective = Objective(divergence, 0.3, entry_clip=0.005, cross_entropy=0.2)
    assert clipped_rows(case, objective).any()
    check(case, objective, torch.bfloat16, advantage_mask=gate)


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary", "architecture"),
    slow_but(
        [(1, 65, 151, "gfx950")],
        [
            (1, 65, 151, "gfx942"),
            (1, 65, 151, "gfx950"),
            (131, 24, 17, "gfx942"),
            (70, 64, 1152, "gfx950"),
        ],
    ),
)
@pytest.mark.parametrize("gate", [None, GATE], ids=["store", "recompute"])
def test_odd_shapes(on_machine, tokens, hidden, vocabulary, architecture, gate):
    """One token, hidden sizes and vocabularies that end within tiles, several row blocks."""
    on_machine(Machine(architecture, Schedule(seed=2)))
    case = make_case(tokens, hidden, vocabulary, seed=6)
    check(case, Objective("forward_kl"), torch.bfloat16, advantage_mask=gate)


def test_log_probs_and_logits_of_a_caller(on_machine):
    """One model, and the gradient in the place of the logits."""
    on_machine(Machine("gfx942", Schedule(seed=3)))

    def values(logprobs, entropy):
        return {"logprobs": logprobs, "entropy": entropy}, logprobs.sum() + 0.3 * entropy.sum()

    def plain(case):
        logprobs = torch.log_softmax(case.student_hidden @ case.weight.T, -1)
        own = logprobs.gather(1, case.targets[:, None])[:, 0]
        return values(own, -(logprobs.exp() * logprobs).sum(-1))

    def ours(case):
        return values(
            *fused_linear_logprobs(case.student_hidden, case.weight, case.targets, backend="triton")
        )

    check_against_torch(make_case(6, 64, 300, seed=2), plain, ours)

    def plain_loss(case):
        loss, divergence, _ = materialised_losses(case, Objective("reverse_kl"))
        return {"divergence": divergence}, loss.mean()

    def in_place(case):
        out = distillation_from_logits(
            case.student_hidden @ case.weight.T, case.teacher_hidden @ case.weight.detach().T,
            case.targets, objective=Objective("reverse_kl"), in_place=True, backend="triton",
        )  # fmt: skip
        return {"divergence": out.divergence}, out.loss

    check_against_torch(make_case(7, 17, 123, seed=3), plain_loss, in_place)
