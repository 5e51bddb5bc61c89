"""Strategy `recompute`: slabs of the vocabulary outermost, one sweep for statistics and one for
gradients (and one for the most likely entries, where an objective asks for them).

Workspace: a tile [r, c] of logits for each model. In the gradient sweep each slab of dW is complete
after its tiles and written once, so no [V, H] accumulator exists whatever the input dtype; dH is
accumulated in float32 over the slabs. Only tokens with a weight take part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from selfdistill_kernels.backends import memory
from selfdistill_kernels.backends.base import Entries, Gradients, LinearInputs, Needs
from selfdistill_kernels.backends.gemm import head_for
from selfdistill_kernels.backends.rows import RowKernels
from selfdistill_kernels.plan import TilePlan


def sweep_statistics(kernels: RowKernels, tokens: Tensor, plan: TilePlan) -> Tensor:
    """Statistics [n, 10] of the tokens [n]."""
    state = kernels.new_state(tokens.numel())
    for start, stop, part, buffer in _tiles(tokens, plan, kernels.inputs.vocabulary):
        tile = kernels.tile(tokens[part], start, stop, buffer, with_teacher=True)
        kernels.accumulate(tile, state[part])
    if kernels.needs_mixture:
        for start, stop, part, buffer in _tiles(tokens, plan, kernels.inputs.vocabulary):
            tile = kernels.tile(tokens[part], start, stop, buffer, with_teacher=True)
            kernels.accumulate_mixture(tile, state[part])
    return kernels.finish(state)


def sweep_top_k(inputs: LinearInputs, k: int, of_teacher: bool, workspace: int) -> Tensor:
    """`Backend.top_k` by library GEMMs, one model alone."""
    tokens = inputs.existing_rows()
    plan = TilePlan.slabs(
        tokens=tokens.numel(), vocabulary=inputs.vocabulary, heads=1, workspace=workspace
    )
    hidden = inputs.teacher_hidden if of_teacher else inputs.student_hidden
    bias = inputs.teacher_bias if of_teacher else inputs.bias
    assert hidden is not None
    head = head_for(inputs.teacher_head if of_teacher else inputs.weight)
    found = tokens.new_zeros((inputs.student_hidden.shape[0], k))
    best = hidden.new_empty((tokens.numel(), 0), dtype=torch.float32)
    entries = tokens.new_empty((tokens.numel(), 0))
    merged: list[tuple[Tensor, Tensor]] = []
    for start, stop, part, buffer in _tiles(tokens, plan, inputs.vocabulary):
        rows = tokens[part]
        scores = buffer.view(-1)[: rows.numel() * (stop - start)].view(rows.numel(), stop - start)
        head.logits(hidden[rows], start, stop, out=scores)
        if bias is not None:
            scores += bias[start:stop]
        if inputs.transform.logit_scale < 0:
            scores.neg_()
        top = scores.topk(min(k, stop - start), dim=1, sorted=False)
        merged.append((top.values, top.indices + start))
        if part.stop < tokens.numel():
            continue
        # The slab is complete: keep the k best of it and of those before.
        best = torch.cat([best, torch.cat([values for values, _ in merged])], dim=1)
        entries = torch.cat([entries, torch.cat([indices for _, indices in merged])], dim=1)
        kept = best.topk(min(k, best.shape[1]), dim=1, sorted=False).indices
        best, entries, merged = best.gather(1, kept), entries.gather(1, kept), []
    return found.index_copy_(0, tokens, entries) if tokens.numel() else found


def sweep_gradients(
    kernels: RowKernels,
    tokens: Tensor,
    plan: TilePlan,
    *,
    statistics: Tensor,
    term_weights: Tensor,
    entries: Entries | None,
    needs: Needs,
) -> Gradients:
    """Gradients for statistics [N, 10], weights [N, 3] and entries; `tokens` [n] are those with one
    of them."""
    inputs = kernels.inputs
    dtype = inputs.student_hidden.dtype
    with_teacher = inputs.teacher_hidden is not None and bool((term_weights[:, 0] != 0).any())
    hidden = weight = bias = None
    slab: Tensor | None = None  # dW [c, H] of the rows so far, float32 until the last
    if needs.hidden:
        # Logits of a caller get each element of their gradient once; dH is a sum over slabs.
        hidden = torch.zeros(
            inputs.student_hidden.shape, dtype=dtype if inputs.weight is None else torch.float32
        )
    if needs.weight:
        assert inputs.weight is not None
        weight = memory.empty(inputs.weight.shape, dtype)
        if tokens.numel() == 0:  # else every slab is written
            weight.zero_()
    if needs.bias:
        bias = torch.zeros(inputs.vocabulary, dtype=torch.float32)

    for start, stop, part, buffer in _tiles(tokens, plan, inputs.vocabulary):
        rows = tokens[part]
        tile = kernels.tile(rows, start, stop, buffer, with_teacher=with_teacher)
        kernels.gradient(tile, statistics[rows], term_weights[rows])
        gradient = kernels.gradient_rows(tile.student)
        if entries is not None:
            entries.write_into(gradient, rows, start)
        if hidden is not None:
            made = kernels.head.hidden_gradient(gradient, start, stop)
            if inputs.weight is None:
                hidden[rows, start:stop] = made.to(dtype)
            else:
                hidden.index_add_(0, rows, made)
        if weight is not None:
            before = None if part.start == 0 else slab
            out = weight[start:stop]
            if part.stop < tokens.numel() and dtype != torch.float32:
                out = torch.empty(out.shape) if before is None else before
            student = inputs.student_hidden[rows]
            kernels.head.weight_gradient(gradient, student, out=out, add=before)
            slab = out
        if bias is not None:
            bias[start:stop] += gradient.sum(dim=0, dtype=torch.float32)
    return Gradients(
        None if hidden is None else hidden.to(dtype),
        weight,
        None if bias is None else bias.to(dtype),
    )


def _tiles(
    tokens: Tensor, plan: TilePlan, vocabulary: int
) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Yield vocabulary start and stop, the slice of `tokens` and the workspace of each tile."""
    count = tokens.numel()
    with memory.workspace(plan.heads * plan.rows * plan.columns) as buffer:
        for start in range(0, vocabulary, plan.columns):
            for first in range(0, count, plan.rows):
                part = slice(first, min(first + plan.rows, count))
                yield start, min(start + plan.columns, vocabulary), part, buffer
