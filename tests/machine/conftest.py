"""AMD machine code of the Triton kernels, executed on the CPU; needs Triton's compiler."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/machine compiles kernels; unset TRITON_INTERPRET")

from selfdistill_kernels.backends import registry
from selfdistill_kernels.backends.triton import TritonBackend
from selfdistill_kernels.backends.triton.launch import Launch
from selfdistill_kernels.tools.audit.record import MACHINES

if TYPE_CHECKING:
    from amd_machine.launch import Machine


@pytest.fixture
def uninitialised() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer, until somebody writes them."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_machine(
    monkeypatch: pytest.MonkeyPatch, uninitialised: None
) -> Callable[[Machine, Launch | None], None]:
    """backend="triton" launches on a machine, or through what is given beside it, in this test."""

    def use(machine: Machine, launch: Launch | None = None) -> None:
        found = replace(registry.found(), interprets=True)  # "triton" takes CPU tensors
        monkeypatch.setattr(registry, "_FOUND", found)
        defaults = (MACHINES[machine.architecture], launch or machine, None)
        monkeypatch.setattr(TritonBackend.__init__, "__defaults__", defaults)

    return use
