"""How a kernel is started: one place, where the audit puts a recorder instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Warps:
    """Compiler options of a kernel without a GEMM."""

    warps: int = 4
    stages: int = 1
    thrifty: bool = False
    max_registers: int | None = None


class Shape(Protocol):
    """The part of a configuration that every launch has."""

    @property
    def warps(self) -> int: ...

    @property
    def stages(self) -> int: ...

    @property
    def thrifty(self) -> bool: ...

    @property
    def max_registers(self) -> int | None: ...


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


def compiler_options(shape: Shape) -> dict[str, Any]:
    """What Triton is told beside the constants."""
    options: dict[str, Any] = {
        "num_warps": shape.warps,
        "num_stages": shape.stages,
        # Fusion is written out in the kernels (divergence.py).
        "enable_fp_fusion": False,
    }
    if shape.thrifty and _knows("sched4reg"):
        options["sched4reg"] = True
    if shape.max_registers is not None and torch.version.hip is None:
        options["maxnreg"] = shape.max_registers
    return options


@cache
def _knows(option: str) -> bool:
    """Whether this Triton has an option for NVIDIA GPUs; an older one refuses unknown names."""
    from triton.backends.nvidia.compiler import CUDAOptions

    return option in CUDAOptions.__dataclass_fields__


def run(
    kernel: Any,
    programs: int,
    shape: Shape,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
) -> None:
    """Launch on the current device and stream."""
    kernel[(programs,)](**arguments, **constants, **compiler_options(shape))
