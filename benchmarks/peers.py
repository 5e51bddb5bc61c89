"""The contenders: the same loss and gradients through each library.

Each builder takes a problem and returns a step, a function without arguments that runs forward and
backward once and returns the mean loss and its gradients as new tensors. The loss of one token is
the problem's objective; masks and denominators are those of `selfdistill_kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contender import Contender, Step, StepResult, gradients
from benchmarks.cross_entropy import (
    core_cross_entropy,
    cut_cross_entropy,
    liger_cross_entropy,
    ours_cross_entropy,
    quack_cross_entropy,
)
from benchmarks.problems import BETAS, Problem, Shape
from selfdistill_kernels import fused_linear_distillation
from selfdistill_kernels.backends.dispatch import Choice, decide
from selfdistill_kernels.backends.native.gemm import widens
from selfdistill_kernels.backends.native.plan import TilePlan
from selfdistill_kernels.backends.registry import found_on

# Rows that Liger scores at a time. Its default, 1024, materialises all logits of the small shapes.
LIGER_ROWS = (128, 1024)
# Rows that torch's own linear_cross_entropy takes at a time.
CORE_ROWS = 1024
# The versions that are compared with, as pip installs them (requirements.txt).
TRL, LIGER = "trl==1.16.0", "liger-kernel==0.8.5"
RHOS = (0.5, 0.2, 0.05)


def contenders(
    workspace: str | int = "auto", *, device: str = "cpu", objective: str = "reverse_kl"
) -> dict[str, Contender]:
    """All contenders by key, in the order of the tables.

    Args:
        workspace: of ours, bytes or "auto".
        device: "cuda" adds ours through each GPU backend that "auto" may pass over.
        objective: "cross_entropy" has contenders of its own, the divergences share theirs.
    """
    if objective == "cross_entropy":
        known = _cross_entropy_contenders()
    else:
        known = _divergence_contenders(workspace, device)
    return {contender.key: contender for contender in known}


def _divergence_contenders(workspace: str | int, device: str) -> list[Contender]:
    def mine(**options: Any) -> Callable[[Problem], Step]:
        return partial(ours, workspace=workspace, **options)

    rows = Contender(
        "ours_rows", "selfdistill, CUDA rows", mine(backend="native"), backend="native"
    )
    return [
        Contender("floor", "floor: 4 GEMMs", partial(floor, trained_head=True)),
        Contender("ours", "selfdistill", mine()),
        *([rows] if device == "cuda" else []),
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
        Contender("trl", "TRL", trl, requires="trl", package=TRL),
        *(
            Contender(
                f"liger_{rows}",
                f"Liger, {rows} rows",
                partial(liger, rows=rows),
                rounds_logits=True,
                requires="liger_kernel",
                package=LIGER,
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
            package=TRL,
        ),
    ]


def _cross_entropy_contenders() -> list[Contender]:
    return [
        Contender("floor", "floor: 3 GEMMs", floor),
        Contender("ours", "selfdistill", ours_cross_entropy),
        Contender("torch", "torch", materialised, rounds_logits=True),
        Contender(
            "torch_compile",
            "torch.compile",
            partial(materialised, compiled=True),
            rounds_logits=True,
            compiled=True,
        ),
        Contender("core", "torch, linear_cross_entropy", core_cross_entropy, rounds_logits=True),
        Contender(
            "core_chunks",
            f"the same, {CORE_ROWS} rows",
            partial(core_cross_entropy, rows=CORE_ROWS),
            rounds_logits=True,
        ),
        Contender(
            "liger",
            "Liger",
            liger_cross_entropy,
            rounds_logits=True,
            requires="liger_kernel",
            package=LIGER,
            gpu_capability=(8, 0),
        ),
        *(
            Contender(
                key,
                label,
                partial(cut_cross_entropy, implementation=key),
                rounds_logits=True,
                requires="cut_cross_entropy",
                package="cut-cross-entropy",
                gpu_capability=(8, 0),
            )
            for key, label in (("cce", "CCE"), ("cce_exact", "CCE, exact"))
        ),
        Contender(
            "quack",
            "quack",
            quack_cross_entropy,
            rounds_logits=True,
            requires="quack",
            package="quack-kernels",
            gpu_capability=(9, 0),
            dtypes=("bfloat16",),
        ),
    ]


def floor(problem: Problem, *, trained_head: bool = True) -> Step:
    """The library GEMMs that no contender can avoid, in the dtype of the inputs.

    Student and (except for cross entropy) teacher logits, dH and, with a trained head, dW. Logits
    go to one buffer that is kept between calls; dH and dW are new tensors, as everyone returns
    them.
    """
    student, teacher = problem.student_hidden.detach(), problem.teacher_hidden
    weight = problem.weight.detach()
    logits = student.new_empty((student.shape[0], weight.shape[0]))

    def step() -> StepResult:
        if problem.has_teacher:
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
    backend: str = "auto",
) -> Step:
    """`fused_linear_distillation`, never through its fallback.

    Raises:
        RuntimeError: only the reference backend could serve the problem.
    """
    head = problem.head(trained_head)
    choice = decide(backend, device=head.device.type, dtype=head.dtype, found=found_on(head.device))
    if choice.backend == "reference":
        raise RuntimeError(_no_backend(choice, head))
    mask = None if rho is None else problem.advantage_mask(rho)

    def step() -> StepResult:
        out = fused_linear_distillation(
            problem.student_hidden,
            problem.teacher_hidden,
            head,
            problem.targets,
            objective=problem.objective,
            advantage_mask=mask,
            workspace=workspace,
            backend=choice.backend,
        )
        return gradients(out.loss, problem.student_hidden, head)

    return step


def _no_backend(choice: Choice, head: Tensor) -> str:
    reasons = [f"{name}: {missing}" for name, missing in choice.passed_over]
    return (
        f"ours: no backend but the reference takes {head.dtype} on {head.device.type!r}, which "
        f"nobody wants timed; {'; '.join(reasons) or 'use another dtype'}"
    )


def plan_of(
    shape: Shape, dtype: torch.dtype, *, trained_head: bool, workspace: str | int = "auto"
) -> TilePlan:
    """The tiles that `ours` walks on the CPU."""
    return TilePlan.choose(
        tokens=shape.tokens,
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        models=2,
        itemsize=dtype.itemsize,
        need_weight=trained_head,
        workspace=0 if workspace == "auto" else int(workspace),
        widened_hidden=shape.hidden if widens(dtype, "cpu") else 0,
    )


def materialised(problem: Problem, *, trained_head: bool = True, compiled: bool = False) -> Step:
    """What most trainers do: `lm_head(hidden).float()`, log_softmax, kl_div or cross_entropy.

    compiled: through torch.compile, of which one such step can live at a time.
    """
    loss_of = materialised_loss
    if compiled:
        # Dynamo counts compilations per function and falls back to eager silently at its limit.
        torch.compiler.reset()
        loss_of = torch.compile(materialised_loss, dynamic=False, fullgraph=True)
    head = problem.head(trained_head)

    def step() -> StepResult:
        loss = loss_of(
            problem.student_hidden, problem.teacher_hidden, head, problem.targets, problem.objective
        )
        return gradients(loss, problem.student_hidden, head)

    return step


def materialised_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: str,
) -> Tensor:
    """Mean objective over tokens, logits float32 (float64 for float64 inputs) in full."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if objective == "cross_entropy":
        return F.cross_entropy((student_hidden @ weight.T).to(dtype), targets)
    student = torch.log_softmax((student_hidden @ weight.T).to(dtype), dim=-1)
    with torch.no_grad():
        teacher = torch.log_softmax((teacher_hidden @ weight.T).to(dtype), dim=-1)
    # F.kl_div(q, p, log_target=True) is KL(p||q).
    if objective == "forward_kl":
        loss = F.kl_div(student, teacher, reduction="sum", log_target=True)
    elif objective == "reverse_kl":
        loss = F.kl_div(teacher, student, reduction="sum", log_target=True)
    else:
        beta = torch.tensor(BETAS[objective], dtype=dtype, device=weight.device)
        mixture = torch.logaddexp(student + torch.log1p(-beta), teacher + torch.log(beta))
        loss = beta * F.kl_div(mixture, teacher, reduction="sum", log_target=True)
        loss = loss + (1 - beta) * F.kl_div(mixture, student, reduction="sum", log_target=True)
    return loss / student_hidden.shape[0]


def trl(problem: Problem, *, trained_head: bool = True) -> Step:
    """TRL's chunked divergence, tiles of 4096 x 32768 (its constants)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    head, teacher_head = problem.head(trained_head), problem.weight.detach()
    beta = BETAS[problem.objective]

    def step() -> StepResult:
        divergence, _ = ChunkedDivergenceFunction.apply(
            problem.student_hidden, head, None, problem.teacher_hidden, teacher_head, None, beta
        )
        return gradients(divergence.mean(), problem.student_hidden, head)

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
        beta=BETAS[problem.objective],
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
        return gradients(loss, problem.student_hidden, problem.weight)

    return step
