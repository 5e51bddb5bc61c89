"""What the kernel can take, its launch, and what a compiler makes of it without a GPU."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.hopper.kernel import (
    BLOCK_COLUMNS,
    BLOCK_HIDDEN,
    BLOCK_ROWS,
    CONSUMERS,
    MULTICAST,
    PARTS,
    specialised_sweep_kernel,
)
from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.triton.backend import TritonBackend
from selfdistill_kernels.backends.triton.columns import STATE
from selfdistill_kernels.backends.triton.launch import compiler_options
from selfdistill_kernels.backends.triton.merge import merge, merge_second
from selfdistill_kernels.backends.triton.plan import Configuration, Machine
from selfdistill_kernels.backends.triton.problem import Problem, Selection
from selfdistill_kernels.backends.triton.sweep import second_sweep
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.statistics import Column
from selfdistill_kernels.tools.audit.record import job_of

ARCHITECTURE = "sm_90"
# Triton 3.6 gave it the arguments that the kernel names.
SPECIALISES = "functions_and_args" in inspect.signature(gl.warp_specialize).parameters
STAGES = 4
WARPS = 4  # of a consumer, as the kernel is compiled; the producer and the other one come on top


@dataclass(frozen=True)
class Form:
    """How the kernel is compiled.

    Attributes:
        cluster: programs that share the tiles of the head, 1 or 2.
    """

    cluster: int = 2

    def __post_init__(self) -> None:
        if not SPECIALISES:
            raise RuntimeError(
                f"the specialised sweep needs Gluon of Triton 3.6 or newer, this is "
                f"{triton.__version__}"
            )
        if self.cluster not in (1, 2):
            raise ValueError(f"cluster: expected 1 or 2, got {self.cluster!r}")
        if self.cluster > 1 and not MULTICAST.value:
            raise ValueError(
                f"cluster: copies to a whole cluster came with Triton 3.7, this is "
                f"{triton.__version__}; take 1"
            )

    @property
    def tile(self) -> Configuration:
        """Rows of a whole cluster, and what the compiler is told."""
        rows = self.cluster * CONSUMERS.value * BLOCK_ROWS.value
        return Configuration(
            rows, BLOCK_COLUMNS.value, BLOCK_HIDDEN.value, PARTS.value, WARPS, STAGES
        )

    @property
    def options(self) -> dict[str, Any]:
        """For Triton."""
        return {**compiler_options(self.tile), "num_ctas": self.cluster}


def check(problem: Problem) -> None:
    """Whether the kernel can take a problem.

    Raises:
        ValueError: it cannot; which argument, what came and what was expected.
    """
    inputs = problem.inputs
    if problem.machine.architecture != ARCHITECTURE:
        raise ValueError(
            f"device: the specialised sweep is for {ARCHITECTURE} (H100, H200), this is "
            f"{problem.machine.architecture}; use TritonBackend"
        )
    if inputs.teacher_hidden is None or inputs.weight is None:
        raise ValueError("teacher_hidden, weight: the specialised sweep needs both")
    for name, tensor in (
        ("student_hidden", inputs.student_hidden),
        ("teacher_hidden", inputs.teacher_hidden),
        ("weight", inputs.weight),
    ):
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"{name}: expected torch.bfloat16, got {tensor.dtype}")
    if inputs.weight.shape[1] % BLOCK_HIDDEN.value:
        raise ValueError(
            f"weight: expected a hidden size that {BLOCK_HIDDEN.value} divides, got "
            f"{inputs.weight.shape[1]}"
        )
    for name, given in (
        ("teacher_weight", inputs.teacher_weight is not None),
        ("shard", inputs.shard is not None),
        ("bias", inputs.bias is not None or inputs.teacher_bias is not None),
        ("transform", problem.scaled or problem.capped),
        ("entry_clip", problem.entry_clip is not None),
    ):
        if given:
            raise ValueError(
                f"{name}: the specialised sweep takes one head, its scores and entries as they "
                "are; use TritonBackend"
            )


def prepared(
    problem: Problem, selection: Selection, student: Tensor, teacher: Tensor, form: Form
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Clusters of the grid, arguments and constants of a launch; student, teacher [capacity, H]."""
    check(problem)
    inputs = problem.inputs
    assert inputs.weight is not None
    machine = replace(
        problem.machine, multiprocessors=problem.machine.multiprocessors // form.cluster
    )
    plan = replace(problem, machine=machine).sweep_plan(form.tile, student, teacher)
    rows = form.cluster * BLOCK_ROWS.value
    divided, whole = _shared_layouts(form)
    partial = torch.empty(
        (plan.pieces, STATE.value, selection.capacity), dtype=torch.float32, device=student.device
    )
    arguments = {
        "student": _descriptor(student, rows, divided),
        "teacher": _descriptor(teacher, rows, divided),
        "head": _descriptor(inputs.weight, BLOCK_COLUMNS.value, whole),
        "targets": inputs.targets,
        "tokens": selection.tokens,
        "count": selection.count,
        "partial": partial,
        "capacity": student.shape[0],
        "vocabulary": problem.vocabulary,
        "size": student.shape[1],
        "pieces": plan.pieces,
        "piece_tiles": plan.piece_tiles,
        "group_rows": plan.group_rows,
    }
    constants = {
        "DIVERGENCE": problem.first_divergence,
        "HAS_TARGETS": inputs.targets is not None,
        "MASKED": problem.vocabulary % BLOCK_COLUMNS.value != 0,
        "STAGES": STAGES,
        "CLUSTER": form.cluster,
    }
    return plan.programs, arguments, constants


def _shared_layouts(form: Form) -> tuple[Any, Any]:
    """Of hidden states, which the programs of a cluster divide, and of the head."""
    block = [form.cluster * BLOCK_ROWS.value, BLOCK_HIDDEN.value]
    default = gl.NVMMASharedLayout.get_default_for
    if form.cluster == 1:
        return (default(block, gl.bfloat16),) * 2
    head = [BLOCK_COLUMNS.value, BLOCK_HIDDEN.value]
    return (
        default(block, gl.bfloat16, cga_layout=[[1, 0]]),
        default(head, gl.bfloat16, cga_layout=[[0, 0]]),
    )


def _descriptor(matrix: Tensor, rows: int, layout: Any) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, BLOCK_HIDDEN.value], layout)


def specialised_sweep(
    problem: Problem, selection: Selection, student: Tensor, teacher: Tensor, form: Form
) -> Tensor:
    """Partial states [pieces, 11, capacity] of compact rows [capacity, H], as `sweep` returns them.

    Raises:
        ValueError: the kernel cannot take the problem.
    """
    programs, arguments, constants = prepared(problem, selection, student, teacher, form)
    specialised_sweep_kernel[(programs,)](**arguments, **constants, **form.options)
    partial: Tensor = arguments["partial"]
    return partial


class SpecialisedBackend(TritonBackend):
    """TritonBackend, whose first sweep over the vocabulary is the specialised one.

    Args:
        form: how it is compiled.
    """

    def __init__(self, form: Form) -> None:
        super().__init__()
        self._form = form

    def statistics(self, inputs: LinearInputs, objective: Objective, workspace: int) -> Tensor:
        """As TritonBackend; the second sweep of a mixture divergence is today's.

        Raises:
            ValueError: the kernel cannot take the inputs.
        """
        problem = Problem(inputs, objective, Machine.of(inputs.student_hidden.device))
        check(problem)
        student, teacher, exists = inputs.student_hidden, inputs.teacher_hidden, inputs.exists
        assert teacher is not None
        size = student.shape[0]
        if exists is None:
            exists = torch.ones(size, dtype=torch.bool, device=student.device)
        selection = Selection.of(exists)
        student, teacher = (problem.compact(hidden, selection) for hidden in (student, teacher))
        statistics = torch.zeros(size, len(Column), dtype=torch.float32, device=student.device)
        partial = specialised_sweep(problem, selection, student, teacher, self._form)
        merge(problem, selection, partial, statistics)
        if problem.needs_mixture:
            partial = second_sweep(problem, selection, student, teacher, statistics)
            merge_second(problem, selection, partial, statistics)
        return statistics


def compiled_for(inputs: LinearInputs, objective: Objective, machine: Machine, form: Form) -> Any:
    """Triton's CompiledKernel for sm_90a as a launch with these inputs would make it; needs no GPU.

    Args:
        inputs: their tensors may be meta tensors.
        objective, machine, form: of the launch.
    """
    problem = Problem(inputs, objective, machine)
    assert inputs.teacher_hidden is not None
    size = inputs.student_hidden.shape[0]
    selection = Selection.of(torch.ones(size, dtype=torch.bool, device="meta"))
    _, arguments, constants = prepared(
        problem, selection, inputs.student_hidden, inputs.teacher_hidden, form
    )
    job = job_of(specialised_sweep_kernel, form.tile, arguments, constants, ARCHITECTURE)
    source = GluonASTSource(job.kernel, dict(job.signature), dict(job.constants), job.attributes)
    capability = int(ARCHITECTURE.removeprefix("sm_"))
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=form.options)
