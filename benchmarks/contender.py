"""What a contender is: a name, a way to build its step, and what it needs to run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.problems import Problem
from selfdistill_kernels import backends


class StepResult(NamedTuple):
    """Loss [] (None for bare GEMMs), dH [N, H] and dW [V, H] (None for a frozen head)."""

    loss: Tensor | None
    hidden: Tensor
    weight: Tensor | None


Step = Callable[[], StepResult]


@dataclass(frozen=True)
class Contender:
    """One line of the tables.

    Attributes:
        key: short name on the command line.
        label: name in tables and plots.
        build: makes the step of a problem.
        trained_head: whether dW is computed; False compares with the floor of a frozen head.
        rho: share of the tokens that the advantage mask keeps, None without a mask.
        rounds_logits: 16-bit inputs give logits rounded to 16 bits (other contenders: float32).
        compiled: the first call compiles.
        requires: the module that it needs; package: what pip calls it.
        backend: of ours, the one that it names; None for "auto" and for others.
        gpu_capability: least compute capability of the GPU that it needs; None: runs on a CPU too.
        dtypes: keys of DTYPES that it takes; empty for all.
    """

    key: str
    label: str
    build: Callable[[Problem], Step]
    trained_head: bool = True
    rho: float | None = None
    rounds_logits: bool = False
    compiled: bool = False
    requires: str = "torch"
    package: str = "torch"
    backend: str | None = None
    gpu_capability: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = ()

    @property
    def floor(self) -> str:
        """Key of the bare GEMMs that this contender cannot avoid."""
        return "floor" if self.trained_head else "floor_frozen"

    @property
    def is_floor(self) -> bool:
        return self.key == self.floor

    @property
    def is_ours(self) -> bool:
        return self.key.startswith("ours")

    def missing(self, device: str, dtype: str | None = None) -> str | None:
        """None, or why it cannot run on "cpu" or "cuda" (with a key of DTYPES), for a person."""
        if importlib.util.find_spec(self.requires) is None:
            return f"{self.requires} is not installed: pip install '{self.package}'"
        if self.gpu_capability is not None:
            if device == "cpu":
                return "runs on a GPU only"
            has = torch.cuda.get_device_capability()
            if has < self.gpu_capability:
                needs = ".".join(map(str, self.gpu_capability))
                return f"needs compute capability {needs}, this GPU has {has[0]}.{has[1]}"
        if self.dtypes and dtype is not None and dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)}, not {dtype}"
        return None if self.backend is None else backends.found().missing(self.backend, device)


def gradients(loss: Tensor, hidden: Tensor, head: Tensor) -> StepResult:
    """The backward pass of a step."""
    wanted = [hidden, head] if head.requires_grad else [hidden]
    dh, *dw = torch.autograd.grad(loss, wanted)
    return StepResult(loss.detach(), dh, dw[0] if dw else None)
