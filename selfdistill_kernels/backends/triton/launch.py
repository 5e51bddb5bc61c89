"""How a kernel is started: one place, where the audit puts a recorder instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

OPTIONS = {"enable_fp_fusion": False}  # fusion is written out in the kernels (divergence.py)
# The assembler for newer GPUs would rather spill a little and have two programs a multiprocessor;
# naming the limit takes that choice away.
NVIDIA_OPTIONS = {**OPTIONS, "maxnreg": 255}


@dataclass(frozen=True)
class Warps:
    """Compiler options of a kernel without a GEMM."""

    warps: int = 4
    stages: int = 1


class Shape(Protocol):
    """The part of a configuration that every launch has."""

    @property
    def warps(self) -> int: ...

    @property
    def stages(self) -> int: ...


class Launch(Protocol):
    """Starts `kernel` on `programs` programs."""

    def __call__(
        self,
        kernel: Any,
        programs: int,
        shape: Shape,
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
    ) -> None: ...


def run(
    kernel: Any,
    programs: int,
    shape: Shape,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
) -> None:
    """Launch on the current device and stream."""
    options = OPTIONS if torch.version.hip is not None else NVIDIA_OPTIONS
    kernel[(programs,)](
        **arguments, **constants, num_warps=shape.warps, num_stages=shape.stages, **options
    )
