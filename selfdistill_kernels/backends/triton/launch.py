"""How a kernel is started: one place, where the audit puts a recorder instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

OPTIONS = {"enable_fp_fusion": False}  # fusion is written out in the kernels (divergence.py)


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
    kernel[(programs,)](
        **arguments, **constants, num_warps=shape.warps, num_stages=shape.stages, **OPTIONS
    )
