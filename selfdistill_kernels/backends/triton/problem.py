"""One problem as the kernels take it: constants, scalars, compact rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.triton.gather import gather_rows
from selfdistill_kernels.backends.triton.launch import Launch, run
from selfdistill_kernels.backends.triton.plan import Configuration, Kind, Machine, SweepPlan
from selfdistill_kernels.backends.triton.tuned_tiles import Tiles
from selfdistill_kernels.objective import DIVERGENCES, Objective

# The widest tile of plan.py; vocabularies that are no multiple of it need masks.
TILE_COLUMNS = 128


@dataclass(frozen=True)
class Selection:
    """Tokens that take part, compacted on the device; the host never learns their number.

    Attributes:
        tokens: [N] int64, token of a compact row; -1 past the count.
        place: [N] int64, compact row of a token; -1 for those that take no part.
        count: [1] int64.
    """

    tokens: Tensor
    place: Tensor
    count: Tensor

    @classmethod
    def of(cls, chosen: Tensor) -> Selection:
        """From [N] bool, N > 0: a prefix sum and a scatter."""
        size = chosen.numel()
        running = chosen.to(torch.int64).cumsum(0)
        place = torch.where(chosen, running - 1, -1)
        # Dropped tokens all write to one place behind the end, which is cut off.
        tokens = torch.full((size + 1,), -1, dtype=torch.int64, device=chosen.device)
        index = torch.arange(size, device=chosen.device)
        tokens.scatter_(0, torch.where(chosen, place, size), index)
        return cls(tokens[:size], place, running[-1:])

    @property
    def capacity(self) -> int:
        """N."""
        return self.tokens.numel()


@dataclass(frozen=True)
class Problem:
    """Inputs, objective and machine.

    Attributes:
        inputs: tensors; all contiguous.
        objective: the loss of a token.
        machine: where it runs.
        launch: starts kernels.
        tiles: what the GEMM kernels run with.
    """

    inputs: LinearInputs
    objective: Objective
    machine: Machine
    launch: Launch = run
    tiles: Tiles = field(default_factory=Tiles)

    @property
    def divergence(self) -> int:
        """Number of the divergence; NONE without a teacher."""
        if self.inputs.teacher_hidden is None:
            return DIVERGENCES["none"]
        return DIVERGENCES[self.objective.kernel_divergence]

    @property
    def needs_mixture(self) -> bool:
        """True when the divergence needs both normalisers before its own sweep."""
        return self.divergence >= DIVERGENCES["jsd"]

    @property
    def entry_clip(self) -> float | None:
        """How much an entry adds to the divergence at most."""
        return None if self.divergence == DIVERGENCES["none"] else self.objective.entry_clip

    @property
    def first_divergence(self) -> int:
        """What the first sweep sums for: that of a mixture only normalises."""
        return min(self.divergence, DIVERGENCES["jsd"])

    @property
    def vocabulary(self) -> int:
        """The size V of the vocabulary."""
        return self.inputs.vocabulary

    def configuration(self, kind: Kind) -> Configuration:
        """Return the tile of a kernel that multiplies matrices."""
        inputs = self.inputs
        heavy = (
            self.needs_mixture
            or self.scaled
            or self.capped
            or inputs.bias is not None
            or inputs.teacher_weight is not None
            or self.vocabulary % TILE_COLUMNS != 0
        )
        itemsize = inputs.student_hidden.element_size()
        return self.tiles.of(self.machine, kind, itemsize, heavy=heavy)

    def compact(self, hidden: Tensor, selection: Selection) -> Tensor:
        """[capacity, columns] the rows of a selection; zeros past the count."""
        return gather_rows(hidden, selection.tokens, hidden.dtype, self.launch)

    def sweep_plan(self, tile: Configuration, student: Tensor, teacher: Tensor | None) -> SweepPlan:
        """How persistent programs walk the whole vocabulary for these compact rows."""
        itemsize = student.element_size()
        teacher_size = 0 if teacher is None else teacher.shape[1]
        separate = teacher is not None and self.inputs.teacher_weight is not None
        return SweepPlan.choose(
            self.machine,
            tile,
            rows=student.shape[0],
            vocabulary=self.vocabulary,
            row_bytes=itemsize * (student.shape[1] + teacher_size),
            head_row_bytes=itemsize * (student.shape[1] + teacher_size * separate),
        )

    def transform(self) -> dict[str, float]:
        """slope, rest, ceiling of transform_logit."""
        t = self.inputs.transform
        slope = t.logit_scale / (t.temperature if t.softcap is None else t.softcap)
        rounded = torch.tensor(slope, dtype=torch.float32).item()
        ceiling = 0.0 if t.softcap is None else t.softcap / t.temperature
        return {"slope": rounded, "rest": slope - rounded, "ceiling": ceiling}

    @property
    def capped(self) -> bool:
        return self.inputs.transform.softcap is not None

    @property
    def scaled(self) -> bool:
        """False where a logit is its score."""
        return self.inputs.transform.logit_scale != self.inputs.transform.temperature

    @property
    def chain(self) -> float:
        """dz / draw without the cap's own derivative."""
        t = self.inputs.transform
        return t.logit_scale / t.temperature

    def scores(
        self,
        student: Tensor,
        teacher: Tensor | None,
        tile: Configuration,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments and constants of tiles.score_tiles for entries [start, stop) of the vocabulary.

        student [capacity, H] and teacher [capacity, H_t] are compact rows.
        """
        inputs = self.inputs
        assert inputs.weight is not None
        stop = self.vocabulary if stop is None else stop
        head = inputs.weight[start:stop]
        shared = inputs.teacher_weight is None
        teacher_head = None
        if teacher is not None:
            teacher_head = (
                head if inputs.teacher_weight is None else inputs.teacher_weight[start:stop]
            )
        # The kernels are compiled for one way of reading, so one matrix decides for all.
        matrices = [student, head, *(m for m in (teacher, teacher_head) if m is not None)]
        descriptors = self.machine.descriptors and all(map(fits_descriptor, matrices))

        bias = None if inputs.bias is None else inputs.bias[start:stop]
        teacher_bias = None if inputs.teacher_bias is None else inputs.teacher_bias[start:stop]
        arguments = {
            "student": operand(student, [tile.rows, tile.inner], descriptors),
            "teacher": operand(teacher, [tile.rows, tile.inner], descriptors),
            "head": operand(head, [tile.columns, tile.inner], descriptors),
            "teacher_head": operand(teacher_head, [tile.columns, tile.inner], descriptors),
            "bias": bias,
            "teacher_bias": None if teacher is None else teacher_bias,
            "capacity": student.shape[0],
            "vocabulary": stop - start,
            "size": student.shape[1],
            "teacher_size": 0 if teacher is None else teacher.shape[1],
            **self.transform(),
        }
        constants = {
            "HAS_TEACHER": teacher is not None,
            "SHARED": shared,
            "HAS_BIAS": bias is not None,
            "HAS_TEACHER_BIAS": teacher is not None and teacher_bias is not None,
            "SCALED": self.scaled,
            "CAPPED": self.capped,
            "MASKED": (stop - start) % tile.columns != 0,
            "DESCRIPTORS": descriptors,
            "EVEN": all(m.shape[1] % tile.inner == 0 for m in matrices),
            "PRECISION": dot_precision(),
            "BLOCK_ROWS": tile.rows,
            "BLOCK_COLUMNS": tile.columns,
            "BLOCK_HIDDEN": tile.inner,
            "PARTS": tile.parts,
        }
        return arguments, constants


@dataclass(frozen=True)
class RowTile:
    """Rows of logits in memory.

    Attributes:
        student: [r, V] raw scores of any float dtype.
        teacher: [r, V] or None, strided like `student`.
        tokens: [r] int64, the token of each row; -1 for none.
    """

    student: Tensor
    teacher: Tensor | None
    tokens: Tensor

    def arguments(self, problem: Problem) -> dict[str, Any]:
        """The arguments that both row kernels take."""
        assert self.teacher is None or self.teacher.stride() == self.student.stride()
        inputs = problem.inputs
        return {
            "student": self.student,
            "teacher": self.teacher,
            "bias": inputs.bias,
            "teacher_bias": None if self.teacher is None else inputs.teacher_bias,
            "targets": inputs.targets,
            "tokens": self.tokens,
            "vocabulary": problem.vocabulary,
            "stride": self.student.stride(0),
            "beta": problem.objective.beta,
            "entry_clip": problem.entry_clip,
            **problem.transform(),
        }

    def constants(self, problem: Problem) -> dict[str, Any]:
        """What both row kernels are compiled for."""
        inputs = problem.inputs
        return {
            "DIVERGENCE": problem.divergence,
            "HAS_TEACHER": self.teacher is not None,
            "HAS_BIAS": inputs.bias is not None,
            "HAS_TEACHER_BIAS": self.teacher is not None and inputs.teacher_bias is not None,
            "HAS_TARGETS": inputs.targets is not None,
            "SCALED": problem.scaled,
            "CAPPED": problem.capped,
        }


def dot_precision() -> str:
    """How float32 operands are multiplied: exactly, unless the user allows tf32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def fits_descriptor(matrix: Tensor) -> bool:
    """Tensor descriptors want rows and base on 16-byte boundaries."""
    return (matrix.stride(0) * matrix.element_size()) % 16 == 0 and matrix.data_ptr() % 16 == 0


def operand(matrix: Tensor | None, block: list[int], descriptors: bool) -> Any:
    """A matrix as the kernels take it: a tensor descriptor for tiles of `block`, or a pointer."""
    if matrix is None or not descriptors:
        return matrix
    return TensorDescriptor.from_tensor(matrix, block)
