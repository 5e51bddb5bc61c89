"""Triton backend: which kernels run, in which order, for the three visits of a backend.

    recompute   sweep -> merge (-> mixture sweep -> merge) (-> the same of clipped entries)
                -> weights -> for each slab: dz, dW, dH
    store       for each tile of rows: logits (library) -> row statistics -> weights -> row
                gradient -> dW, dH (library)

Nothing is read back to the host: rows are compacted by a prefix sum on the device, kernels read
the count there, and what lies past it is left out or zero.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.interface import (
    Entries,
    Expected,
    Gradients,
    LinearInputs,
    Needs,
    rows_with_gradient,
)
from selfdistill_kernels.backends.native.recompute import sweep_top_k
from selfdistill_kernels.backends.triton.clip import may_be_clipped
from selfdistill_kernels.backends.triton.gather import gather_rows
from selfdistill_kernels.backends.triton.gradient import slab_gradient
from selfdistill_kernels.backends.triton.launch import Launch, run
from selfdistill_kernels.backends.triton.merge import merge, merge_second
from selfdistill_kernels.backends.triton.plan import Machine, SlabPlan, store_rows
from selfdistill_kernels.backends.triton.problem import Problem, RowTile, Selection
from selfdistill_kernels.backends.triton.product import hidden_product, weight_product
from selfdistill_kernels.backends.triton.rows import row_gradient, row_statistics
from selfdistill_kernels.backends.triton.sweep import second_sweep, sweep
from selfdistill_kernels.backends.triton.tuned_tiles import Tiles, tiles_in_use
from selfdistill_kernels.objective import DIVERGENCES, Objective
from selfdistill_kernels.statistics import Column
from selfdistill_kernels.token_loss import active_tokens, term_weights_of
from selfdistill_kernels.tolerance import Rounding

NONE = DIVERGENCES["none"]
NO_GRADIENTS = Gradients(None, None, None)


class TritonBackend:
    """float32, bfloat16 and float16 inputs on a GPU, or on the CPU under Triton's interpreter.

    Args:
        machine: what to plan for; None asks the inputs' device.
        launch: how kernels are started.
        tiles: what the GEMM kernels run with; None takes what the environment asks for, once.
    """

    def __init__(
        self,
        machine: Machine | None = None,
        launch: Launch = run,
        tiles: Tiles | None = None,
    ) -> None:
        self._machine = machine
        self._launch = launch
        self._tiles = tiles_in_use() if tiles is None else tiles

    def statistics(self, inputs: LinearInputs, objective: Objective, workspace: int) -> Tensor:
        problem = self._problem(inputs, objective)
        statistics = _new_statistics(inputs)
        if inputs.student_hidden.shape[0] > 0:
            with _device_of(inputs.student_hidden):
                if inputs.weight is None:
                    row_statistics(problem, _whole_tile(inputs), statistics)
                else:
                    _sweep_statistics(problem, statistics)
        return statistics

    def keep(
        self,
        inputs: LinearInputs,
        objective: Objective,
        expected: Expected,
        workspace: int,
        rounding: Rounding | None = None,
    ) -> None:
        """Keep nothing: the backward pass makes the logits again."""

    def top_k(self, inputs: LinearInputs, k: int, of_teacher: bool, workspace: int) -> Tensor:
        with torch.device(inputs.student_hidden.device):
            return sweep_top_k(inputs, k, of_teacher, workspace)

    def visit(
        self,
        inputs: LinearInputs,
        objective: Objective,
        gate: Gate | None,
        loss_weight: Tensor,
        old_logprobs: Tensor | None,
        needs: Needs,
        workspace: int,
        rounding: Rounding | None = None,
    ) -> tuple[Tensor, Tensor, Gradients]:
        problem = self._problem(inputs, objective)
        loss_weight = loss_weight.to(torch.float32)
        rows = store_rows(
            rows=inputs.student_hidden.shape[0],
            vocabulary=inputs.vocabulary,
            heads=1 if inputs.teacher_hidden is None else 2,
            itemsize=inputs.student_hidden.element_size(),
            gated=gate is not None,
            workspace=workspace,
        )
        if needs and rows and inputs.weight is not None:
            statistics = _new_statistics(inputs)
            with _device_of(inputs.student_hidden):
                gradients = _store(problem, rows, loss_weight, old_logprobs, needs, statistics)
            return (
                statistics,
                active_tokens(statistics, loss_weight, inputs.exists, None),
                gradients,
            )
        statistics = self.statistics(inputs, objective, workspace)
        active = active_tokens(statistics, loss_weight, inputs.exists, gate)
        weights = term_weights_of(objective, statistics, loss_weight * active, old_logprobs)
        gradients = self._gradient(
            problem, statistics, weights, needs, workspace, dense=gate is None
        )
        return statistics, active, gradients

    def gradient(
        self,
        inputs: LinearInputs,
        objective: Objective,
        statistics: Tensor,
        term_weights: Tensor,
        needs: Needs,
        workspace: int,
        entries: Entries | None = None,
        rounding: Rounding | None = None,
    ) -> Gradients:
        # Upstream gradients decide which tokens take part: nothing says that most do.
        problem = self._problem(inputs, objective)
        return self._gradient(
            problem, statistics, term_weights, needs, workspace, dense=False, entries=entries
        )

    def _gradient(
        self,
        problem: Problem,
        statistics: Tensor,
        term_weights: Tensor,
        needs: Needs,
        workspace: int,
        *,
        dense: bool,
        entries: Entries | None = None,
    ) -> Gradients:
        inputs = problem.inputs
        if not needs:
            return NO_GRADIENTS
        if inputs.student_hidden.shape[0] == 0:
            return _zero_gradients(inputs, needs)
        term_weights = term_weights.to(torch.float32).contiguous()
        with _device_of(inputs.student_hidden):
            if inputs.weight is None:
                return _logits_gradient(problem, statistics, term_weights, entries)
            return _slab_gradients(
                problem, statistics, term_weights, needs, workspace, dense=dense, entries=entries
            )

    def _problem(self, inputs: LinearInputs, objective: Objective) -> Problem:
        machine = self._machine or Machine.of(inputs.student_hidden.device)
        return Problem(inputs, objective, machine, self._launch, self._tiles)


# ---- recompute -----------------------------------------------------------------------------------


def _sweep_statistics(problem: Problem, statistics: Tensor) -> None:
    """Fill statistics [N, 10] of the existing tokens."""
    inputs = problem.inputs
    selection = Selection.of(_existing(inputs))
    student, teacher = _compact(problem, selection)
    merge(problem, selection, sweep(problem, selection, student, teacher), statistics)
    if problem.needs_mixture:
        assert teacher is not None
        partial = second_sweep(problem, selection, student, teacher, statistics)
        merge_second(problem, selection, partial, statistics)
    if problem.entry_clip is not None:
        if problem.divergence == DIVERGENCES["reverse_kl"]:
            statistics[:, Column.PIVOT] = statistics[:, Column.DIVERGENCE]
        chosen = may_be_clipped(statistics[:, Column.DIVERGENCE], problem.objective)
        selection = Selection.of(chosen & _existing(inputs))
        student, teacher = _compact(problem, selection)
        assert teacher is not None
        partial = second_sweep(problem, selection, student, teacher, statistics, of_clipped=True)
        merge_second(problem, selection, partial, statistics, of_clipped=True)


def _slab_gradients(
    problem: Problem,
    statistics: Tensor,
    term_weights: Tensor,
    needs: Needs,
    workspace: int,
    *,
    dense: bool,
    entries: Entries | None,
) -> Gradients:
    """Take slabs of the vocabulary in turn: dW is written slab by slab, dH is a float32 sum."""
    inputs, launch = problem.inputs, problem.launch
    assert inputs.weight is not None
    hidden, head = inputs.student_hidden, inputs.weight
    dtype = hidden.dtype
    selection = Selection.of(rows_with_gradient(inputs, term_weights, entries))
    student, teacher = _compact(problem, selection, with_teacher=problem.divergence != NONE)
    scale, unscale = _loss_scale(term_weights, dtype)
    capacity = selection.capacity
    tile = problem.configuration("product")
    width = SlabPlan.choose(
        problem.configuration("gradient"),
        rows=capacity,
        vocabulary=problem.vocabulary,
        itemsize=hidden.element_size(),
        workspace=workspace,
    ).columns
    if entries is not None:
        # Entries are written by torch, which wants to know the rows: a wait, for top-k only.
        rows = selection.tokens[: int(selection.count)]
        entries = entries if scale is None else entries._replace(values=entries.values * scale)
    # Rows past the count stay zero in every slab, whoever multiplies them.
    slab = hidden.new_zeros((capacity, width))
    made_hidden = hidden.new_zeros((capacity, hidden.shape[1]), dtype=torch.float32)
    weight = torch.empty_like(head) if needs.weight else None
    bias = None if inputs.bias is None or not needs.bias else torch.empty_like(inputs.bias)
    for start in range(0, problem.vocabulary, width):
        stop = min(start + width, problem.vocabulary)
        dz = slab[:, : stop - start]
        slab_gradient(
            problem, selection, student, teacher, statistics, term_weights, scale, start, stop, dz
        )
        if entries is not None:
            entries.write_into(dz[: rows.numel()], rows, start)
        if needs.hidden:
            if dense:
                _add_product(made_hidden, dz, head[start:stop])
            else:
                hidden_product(
                    problem.machine, tile, launch, dz, head[start:stop], selection.count,
                    made_hidden, add=start > 0,
                )  # fmt: skip
        if weight is not None:
            if dense:
                _write_product(weight[start:stop], dz.mT, student, unscale)
            else:
                weight_product(
                    problem.machine, tile, launch, dz, student, selection.count,
                    weight[start:stop], unscale,
                )  # fmt: skip
        if bias is not None:
            bias[start:stop] = _unscaled(dz.sum(dim=0, dtype=torch.float32), unscale)
    made = None
    if needs.hidden:
        made = gather_rows(made_hidden, selection.place, dtype, launch, unscale)
    return Gradients(made, weight, bias)


# ---- store ---------------------------------------------------------------------------------------


def _store(
    problem: Problem,
    rows: int,
    loss_weight: Tensor,
    old_logprobs: Tensor | None,
    needs: Needs,
    statistics: Tensor,
) -> Gradients:
    """Take tiles of `rows` tokens that span the vocabulary, and fill statistics [N, 10]."""
    inputs, launch = problem.inputs, problem.launch
    assert inputs.weight is not None
    hidden, head = inputs.student_hidden, inputs.weight
    dtype = hidden.dtype
    selection = Selection.of(_existing(inputs))
    student, teacher = _compact(problem, selection)
    capacity, vocabulary = selection.capacity, problem.vocabulary
    scale, unscale = _loss_scale(loss_weight, dtype)

    # One tile of scores serves all tiles; a float32 gradient takes its place.
    scores = hidden.new_empty((rows, vocabulary), dtype=torch.float32)
    teacher_scores = None if teacher is None else torch.empty_like(scores)
    gradient = scores if dtype == torch.float32 else hidden.new_empty((rows, vocabulary))
    made_hidden = hidden.new_zeros((capacity, hidden.shape[1]), dtype=torch.float32)
    one_tile = rows >= capacity
    weight = bias = None
    if needs.weight:
        # One tile writes dW once, in its dtype; several add up in float32.
        weight = torch.empty_like(head) if one_tile else torch.zeros_like(head, dtype=torch.float32)
    if needs.bias:
        assert inputs.bias is not None
        bias = hidden.new_zeros(vocabulary, dtype=torch.float32)
    for first in range(0, capacity, rows):
        part = slice(first, min(first + rows, capacity))
        size = part.stop - part.start
        _write_product(scores[:size], student[part], head.mT)
        if teacher is not None:
            assert teacher_scores is not None
            assert inputs.teacher_head is not None
            _write_product(teacher_scores[:size], teacher[part], inputs.teacher_head.mT)
        tile = RowTile(
            scores[:size],
            None if teacher_scores is None else teacher_scores[:size],
            selection.tokens[part],
        )
        # Statistics, weights and gradient while the tile is in memory: nothing is computed twice.
        row_statistics(problem, tile, statistics)
        weights = term_weights_of(problem.objective, statistics, loss_weight, old_logprobs)
        dz = gradient[:size]
        row_gradient(problem, tile, statistics, weights.contiguous(), scale, dz)
        if needs.hidden:
            _write_product(made_hidden[part], dz, head)
        if weight is not None:
            if one_tile:
                _write_product(weight, dz.mT, student[part], unscale)
            else:
                _add_product(weight, dz.mT, student[part])
        if bias is not None:
            bias += dz.sum(dim=0, dtype=torch.float32)
    made = None
    if needs.hidden:
        made = gather_rows(made_hidden, selection.place, dtype, launch, unscale)
    return Gradients(
        made,
        weight if weight is None or one_tile else _unscaled(weight, unscale).to(dtype),
        None if bias is None else _unscaled(bias, unscale).to(dtype),
    )


def _logits_gradient(
    problem: Problem, statistics: Tensor, term_weights: Tensor, entries: Entries | None
) -> Gradients:
    """Return the gradient of the caller's logits, which is the result itself."""
    inputs = problem.inputs
    made = torch.empty_like(inputs.student_hidden)
    row_gradient(problem, _whole_tile(inputs), statistics, term_weights, None, made)
    if entries is not None:
        rows = rows_with_gradient(inputs, term_weights, entries).nonzero().squeeze(1)
        found = made[rows]
        entries.write_into(found, rows, 0)
        made[rows] = found
    return Gradients(made, None, None)


# ---- library products ----------------------------------------------------------------------------


def _write_product(to: Tensor, left: Tensor, right: Tensor, factor: Tensor | None = None) -> None:
    """to = factor left right, multiplied in the dtype of the operands, summed in float32."""
    if factor is not None:
        to.copy_(_float32_product(left, right) * factor)
    elif to.dtype == left.dtype:
        torch.mm(left, right, out=to)
    elif left.device.type == "cpu":
        to.copy_(_float32_product(left, right))
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=to)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """to += left right for a float32 `to`."""
    if left.dtype == torch.float32:
        to.addmm_(left, right)
    elif left.device.type == "cpu":
        to.addmm_(left.float(), right.float())
    else:
        torch.addmm(to, left, right, out_dtype=torch.float32, out=to)


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left right with float32 results from operands of any dtype."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cpu":  # under the interpreter; torch has no such GEMM there
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


# ---- small things --------------------------------------------------------------------------------


def _compact(
    problem: Problem, selection: Selection, *, with_teacher: bool = True
) -> tuple[Tensor, Tensor | None]:
    inputs = problem.inputs
    student = problem.compact(inputs.student_hidden, selection)
    if inputs.teacher_hidden is None or not with_teacher:
        return student, None
    return student, problem.compact(inputs.teacher_hidden, selection)


def _existing(inputs: LinearInputs) -> Tensor:
    if inputs.exists is not None:
        return inputs.exists
    return inputs.student_hidden.new_ones(inputs.student_hidden.shape[0], dtype=torch.bool)


def _whole_tile(inputs: LinearInputs) -> RowTile:
    size, device = inputs.student_hidden.shape[0], inputs.student_hidden.device
    tokens = torch.arange(size, device=device)
    return RowTile(
        inputs.student_hidden,
        inputs.teacher_hidden,
        torch.where(_existing(inputs), tokens, -1),
    )


def _new_statistics(inputs: LinearInputs) -> Tensor:
    hidden = inputs.student_hidden
    return hidden.new_zeros((hidden.shape[0], len(Column)), dtype=torch.float32)


def _zero_gradients(inputs: LinearInputs, needs: Needs) -> Gradients:
    return Gradients(
        torch.zeros_like(inputs.student_hidden) if needs.hidden else None,
        torch.zeros_like(inputs.weight) if needs.weight and inputs.weight is not None else None,
        torch.zeros_like(inputs.bias) if needs.bias and inputs.bias is not None else None,
    )


def _loss_scale(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Power of two that lifts float16 gradients out of the subnormals, and its inverse; [1] each.

    float16 ends at 6e-8 and a mean over 8192 tokens weighs each with 1e-4. The other dtypes have
    float32's exponents.
    """
    if dtype != torch.float16:
        return None, None
    largest = weights.abs().amax().to(torch.float32)
    exponent = torch.where(largest > 0, -torch.floor(torch.log2(largest)), 0.0).clamp(-100, 100)
    return torch.exp2(exponent).reshape(1), torch.exp2(-exponent).reshape(1)


def _unscaled(value: Tensor, factor: Tensor | None) -> Tensor:
    return value if factor is None else value * factor


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
