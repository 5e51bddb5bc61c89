"""csrc/cuda on the host: its operators, registered for CUDA, called with CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_build import build_emulated_operators

import selfdistill_kernels  # noqa: F401  (defines the operators)


class EmulatedOperators:
    """As torch.ops.selfdistill, on the emulated GPU."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.selfdistill, name).default
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return lambda *arguments: operator.redispatch(key, *arguments)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedOperators:
    library = build_emulated_operators(Path(tmp_path_factory.mktemp("emulated")))
    torch.ops.load_library(str(library))
    return EmulatedOperators()
