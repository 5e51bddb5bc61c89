"""Values and gradients that the machine code of gfx942 and gfx950 computes, against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from amd_machine.execute import Schedule
from amd_machine.launch import Machine
from kernel_cases import DIVERGENCES, make_case
from slow import slow_but
from triton_case import check

from selfdistill_kernels import AdvantageMask, Objective

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
