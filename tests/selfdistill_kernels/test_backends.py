"""Choice of backend: what "auto" takes, and life without the compiled extension."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from selfdistill_kernels import backends
from selfdistill_kernels.backends import choose_backend

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, "native"),
        (torch.bfloat16, "native"),
        (torch.float64, "reference"),
        (torch.float16, "reference"),
    ],
)
def test_auto(dtype, expected):
    assert choose_backend("auto", device=CPU, dtype=dtype) == expected


def test_other_devices_take_the_reference():
    device = torch.device("meta")
    assert choose_backend("auto", device=device, dtype=torch.float32) == "reference"


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["selfdistill_kernels._C"] = None  # as on a machine where it could not be built
import torch
from selfdistill_kernels import fused_linear_distillation

hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        fused_linear_distillation(hidden, hidden.detach() + 1, weight).loss.backward()
messages = [str(w.message) for w in caught]
assert len(messages) == 1, messages
assert "reference backend" in messages[0] and "compiler" in messages[0], messages
assert hidden.grad.any()
try:
    fused_linear_distillation(hidden, hidden.detach(), weight, backend="native")
except RuntimeError as error:
    assert "not available" in str(error)
else:
    raise AssertionError("native was asked for and is not there")
"""


def test_without_the_extension_the_reference_works_and_says_so_once():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


def test_triton_refuses_what_it_cannot_serve():
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ValueError, match="on a GPU, got torch"):
            choose_backend("triton", device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="float64"):
        choose_backend("triton", device=torch.device("cuda"), dtype=torch.float64)


def test_missing_triton_is_said_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="pip install"):
        choose_backend("triton", device=torch.device("cuda"), dtype=torch.float32)
