"""The contenders: the same loss and gradients through each library.

Each builder takes a problem and returns a step, a function without arguments that runs forward and
backward once and returns the mean loss and its gradients as new tensors. The loss of one token is
the problem's divergence; masks and denominators are those of `selfdistill_kernels`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problems import BETAS, Problem, Shape
from selfdistill_kernels import fused_linear_distillation
from selfdistill_kernels.plan import TilePlan

# Rows that Liger scores at a time. Its default, 1024, materialises all logits of the small shapes.
LIGER_ROWS = (128, 1024)
RHOS = (0.5, 0.2, 0.05)


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
        trained_head: whether dW is computed; False compares with the floor of three GEMMs.
        rho: share of the tokens that the advantage mask keeps, None without a mask.
        rounds_logits: 16-bit inputs give logits rounded to 16 bits (other contenders: float32).
        compiled: the first call compiles.
        requires: the package that it needs.
    """

    key: str
    label: str
    build: Callable[[Problem], Step]
    trained_head: bool = True
    rho: float | None = None
    rounds_logits: bool = False
    compiled: bool = False
    requires: str = "torch"

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

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.requires) is not None


def contenders(workspace: str | int = "auto") -> dict[str, Contender]:
    """All contenders by key, in the order of the tables.

    Args:
        workspace: of ours, bytes or "auto".
    """

    def mine(**options: Any) -> Callable[[Problem], Step]:
        return partial(ours, workspace=workspace, **options)

    found = [
        Contender("floor", "floor: 4 GEMMs", partial(floor, trained_head=True)),
        Contender("ours", "selfdistill", mine()),
        *(
            Contender(f"ours_rho_{rho}", f"selfdistill, rho {rho}", mine(rho=rho), rho=rho)
            for rho in RHOS
        ),
        Contender("torch", "torch", materialised, rounds_logits=True),
        Contender(
            "torch_compile",
            "torch.compile",
            partial(materialised, compiled=True),
            rounds_logits=True,
            compiled=True,
        ),
        Contender("trl", "TRL", trl, requires="trl"),
        *(
            Contender(
                f"liger_{rows}",
                f"Liger, {rows} rows",
                partial(liger, rows=rows),
                rounds_logits=True,
                requires="liger_kernel",
            )
            for rows in LIGER_ROWS
        ),
        Contender(
            "floor_frozen", "floor: 3 GEMMs, frozen", partial(floor, trained_head=False), False
        ),
        Contender("ours_frozen", "selfdistill, frozen", mine(trained_head=False), False),
        Contender(
            "ours_frozen_rho_0.05",
            "selfdistill, frozen, rho 0.05",
            mine(trained_head=False, rho=0.05),
            False,
            rho=0.05,
        ),
        Contender(
            "torch_frozen",
            "torch, frozen",
            partial(materialised, trained_head=False),
            False,
            rounds_logits=True,
        ),
        Contender(
            "trl_frozen",
            "TRL, frozen",
            partial(trl, trained_head=False),
            False,
            requires="trl",
        ),
    ]
    return {contender.key: contender for contender in found}


def floor(problem: Problem, *, trained_head: bool = True) -> Step:
    """The library GEMMs that no contender can avoid, in the dtype of the inputs.

    Student and teacher logits, dH and, with a trained head, dW. Logits go to one buffer that is
    kept between calls; dH and dW are new tensors, as everyone returns them.
    """
    student, teacher = problem.student_hidden.detach(), problem.teacher_hidden
    weight = problem.weight.detach()
    logits = student.new_empty((student.shape[0], weight.shape[0]))

    def step() -> StepResult:
        torch.mm(teacher, weight.T, out=logits)
        torch.mm(student, weight.T, out=logits)
        dw = torch.mm(logits.T, student) if trained_head else None
        return StepResult(None, torch.mm(logits, weight), dw)

    return step


def ours(
    problem: Problem,
    *,
    trained_head: bool = True,
    rho: float | None = None,
    workspace: str | int = "auto",
) -> Step:
    """`fused_linear_distillation`; on a CPU never its fallback."""
    head = problem.head(trained_head)
    backend = "native" if head.device.type == "cpu" else "auto"
    mask = None if rho is None else problem.advantage_mask(rho)

    def step() -> StepResult:
        out = fused_linear_distillation(
            problem.student_hidden,
            problem.teacher_hidden,
            head,
            problem.targets,
            objective=problem.divergence,
            advantage_mask=mask,
            workspace=workspace,
            backend=backend,
        )
        return _backward(out.loss, problem.student_hidden, head)

    return step


def plan_of(
    shape: Shape, dtype: torch.dtype, *, trained_head: bool, workspace: str | int = "auto"
) -> TilePlan:
    """The tiles that `ours` walks on the CPU."""
    return TilePlan.choose(
        tokens=shape.tokens,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        heads=2,
        itemsize=dtype.itemsize,
        need_weight=trained_head,
        workspace=0 if workspace == "auto" else int(workspace),
    )


def materialised(problem: Problem, *, trained_head: bool = True, compiled: bool = False) -> Step:
    """What most trainers do: `lm_head(hidden).float()`, log_softmax, kl_div.

    compiled: through torch.compile, of which one such step can live at a time.
    """
    loss_of = materialised_loss
    if compiled:
        # Dynamo counts compilations per function and falls back to eager silently at its limit.
        torch.compiler.reset()
        loss_of = torch.compile(materialised_loss, dynamic=False, fullgraph=True)
    head, divergence = problem.head(trained_head), problem.divergence

    def step() -> StepResult:
        loss = loss_of(problem.student_hidden, problem.teacher_hidden, head, divergence)
        return _backward(loss, problem.student_hidden, head)

    return step


def materialised_loss(
    student_hidden: Tensor, teacher_hidden: Tensor, weight: Tensor, divergence: str
) -> Tensor:
    """Mean divergence over tokens, logits float32 (float64 for float64 inputs) in full."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    student = torch.log_softmax((student_hidden @ weight.T).to(dtype), dim=-1)
    with torch.no_grad():
        teacher = torch.log_softmax((teacher_hidden @ weight.T).to(dtype), dim=-1)
    # F.kl_div(q, p, log_target=True) is KL(p||q).
    if divergence == "forward_kl":
        loss = F.kl_div(student, teacher, reduction="sum", log_target=True)
    elif divergence == "reverse_kl":
        loss = F.kl_div(teacher, student, reduction="sum", log_target=True)
    else:
        beta = torch.tensor(BETAS[divergence], dtype=dtype, device=weight.device)
        mixture = torch.logaddexp(student + torch.log1p(-beta), teacher + torch.log(beta))
        loss = beta * F.kl_div(mixture, teacher, reduction="sum", log_target=True)
        loss = loss + (1 - beta) * F.kl_div(mixture, student, reduction="sum", log_target=True)
    return loss / student_hidden.shape[0]


def trl(problem: Problem, *, trained_head: bool = True) -> Step:
    """TRL's chunked divergence, tiles of 4096 x 32768 (its constants)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    head, teacher_head = problem.head(trained_head), problem.weight.detach()
    beta = BETAS[problem.divergence]

    def step() -> StepResult:
        divergence, _ = ChunkedDivergenceFunction.apply(
            problem.student_hidden, head, None, problem.teacher_hidden, teacher_head, None, beta
        )
        return _backward(divergence.mean(), problem.student_hidden, head)

    return step


def liger(problem: Problem, *, rows: int) -> Step:
    """Liger's chunked JSD without its cross-entropy term; compiled, its default, on GPUs only.

    It has no frozen head: dW is always computed.
    """
    from liger_kernel.chunked_loss import (
        LigerFusedLinearJSDLoss,
    )

    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETAS[problem.divergence],
        compiled=problem.weight.device.type == "cuda",
        chunk_size=rows,
    )
    teacher_head = problem.weight.detach()

    def step() -> StepResult:
        loss = loss_of(
            problem.student_hidden,
            problem.weight,
            problem.teacher_hidden,
            teacher_head,
            problem.targets,
        )
        return _backward(loss, problem.student_hidden, problem.weight)

    return step


def _backward(loss: Tensor, hidden: Tensor, head: Tensor) -> StepResult:
    wanted = [hidden, head] if head.requires_grad else [hidden]
    dh, *dw = torch.autograd.grad(loss, wanted)
    return StepResult(loss.detach(), dh, dw[0] if dw else None)
