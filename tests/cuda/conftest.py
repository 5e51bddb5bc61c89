"""csrc/cuda on the host: its operators, registered for CUDA, called with CPU tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_build import build_emulated_operators

import selfdistill_kernels  # noqa: F401  (defines the operators)

ON_DEVICE = {
    "row_visit_", "row_statistics_", "row_mixture_", "row_clip_", "row_finish", "row_gradient_",
    "gather_active_rows_",
}  # fmt: skip


class EmulatedOperators:
    """As torch.ops.selfdistill, with the row kernels on the emulated GPU."""

    def __init__(self) -> None:
        self._operators = torch.ops.selfdistill

    def __getattr__(self, name: str) -> Any:
        operator = getattr(self._operators, name)
        if name not in ON_DEVICE:
            return operator
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        return lambda *arguments: operator.default.redispatch(key, *arguments)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedOperators:
    library = build_emulated_operators(Path(tmp_path_factory.mktemp("emulated")))
    torch.ops.load_library(str(library))
    return EmulatedOperators()
