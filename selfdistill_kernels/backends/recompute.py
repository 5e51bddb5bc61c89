"""Strategy `recompute`: slabs of the vocabulary outermost, one sweep for statistics and one for
gradients (and one for the most likely entries, where an objective asks for them).

Workspace: a tile [r, c] of logits for each model. In the gradient sweep each slab of dW is complete
after its tiles and written once, so no [V, H] accumulator exists whatever the input dtype. 16-bit
inputs need float32 sums beside the tile: dH [n, H], over the slabs, and a slab of dW [c, H], over
the tiles of tokens where there are several. Only tokens with a weight take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from selfdistill_kernels.backends import memory
from selfdistill_kernels.backends.base import Entries, Gradients, LinearInputs, Needs
from selfdistill_kernels.backends.gemm import head_for
from selfdistill_kernels.backends.rows import RowKernels, Tile
from selfdistill_kernels.backends.tokens import Tokens
from selfdistill_kernels.plan import TilePlan


def sweep_statistics(kernels: RowKernels, plan: TilePlan) -> Tensor:
    """Statistics [n, 10] of the n tokens that exist."""
    tokens = kernels.inputs.tokens
    state = kernels.new_state(tokens.count)

    def sweep(accumulate: Callable[[Tile, Tensor], None]) -> None:
        for start, stop, first, last, buffer in _tiles(tokens.count, plan, kernels.inputs):
            part = tokens.part(first, last)
            tile = kernels.tile(part, start, stop, buffer, with_teacher=True)
            accumulate(tile, state[first:last])

    sweep(kernels.accumulate)
    if kernels.needs_mixture:
        sweep(kernels.accumulate_mixture)
    return kernels.finish(state)


def sweep_top_k(inputs: LinearInputs, k: int, of_teacher: bool, workspace: int) -> Tensor:
    """`Backend.top_k` by library GEMMs, one model alone."""
    tokens = inputs.tokens
    hidden = inputs.teacher_hidden if of_teacher else inputs.student_hidden
    bias = inputs.teacher_bias if of_teacher else inputs.bias
    assert hidden is not None
    plan = TilePlan.slabs(
        tokens=tokens.count,
        hidden=hidden.shape[1],
        vocabulary=inputs.vocabulary,
        heads=1,
        itemsize=hidden.element_size(),
        on_gpu=hidden.is_cuda,
        workspace=workspace,
    )
    head = head_for(inputs.teacher_head if of_teacher else inputs.weight)
    found = hidden.new_zeros((hidden.shape[0], k), dtype=torch.int64)
    best = hidden.new_empty((tokens.count, 0), dtype=torch.float32)
    entries = found.new_empty((tokens.count, 0))
    merged: list[tuple[Tensor, Tensor]] = []
    for start, stop, first, last, buffer in _tiles(tokens.count, plan, inputs):
        rows, columns = last - first, stop - start
        scores = buffer[: rows * columns].view(rows, columns)
        head.logits(tokens.part(first, last).of(hidden), start, stop, out=scores)
        if bias is not None:
            scores += bias[start:stop]
        if inputs.transform.logit_scale < 0:
            scores.neg_()
        top = scores.topk(min(k, stop - start), dim=1, sorted=False)
        merged.append((top.values, top.indices + start))
        if last < tokens.count:
            continue
        # The slab is complete: keep the k best of it and of those before.
        best = torch.cat([best, torch.cat([values for values, _ in merged])], dim=1)
        entries = torch.cat([entries, torch.cat([indices for _, indices in merged])], dim=1)
        kept = best.topk(min(k, best.shape[1]), dim=1, sorted=False).indices
        best, entries, merged = best.gather(1, kept), entries.gather(1, kept), []
    if tokens.count:
        tokens.put(found, entries)
    return found


def sweep_gradients(
    kernels: RowKernels,
    tokens: Tokens,
    plan: TilePlan,
    *,
    statistics: Tensor,
    term_weights: Tensor,
    entries: Entries | None,
    needs: Needs,
) -> Gradients:
    """Gradients for statistics [N, 10], weights [N, 3] and entries; `tokens` are those with one of
    them."""
    inputs = kernels.inputs
    student, device, dtype = inputs.student_hidden, inputs.device, inputs.student_hidden.dtype
    with_teacher = inputs.teacher_hidden is not None and bool((term_weights[:, 0] != 0).any())
    hidden = weight = bias = slab = None
    # Where the sums of dH lie: in dH itself, or for 16-bit inputs in float32 [n, H]. Logits of a
    # caller get each element of their gradient once.
    is_summed_apart = inputs.weight is not None and dtype != torch.float32
    places = Tokens(tokens.count) if is_summed_apart else tokens
    if needs.hidden:
        hidden = (
            student.new_zeros((tokens.count, student.shape[1]), dtype=torch.float32)
            if is_summed_apart
            else torch.zeros_like(student)
        )
    if needs.weight:
        assert inputs.weight is not None
        weight = memory.empty(inputs.weight.shape, device, dtype)
        if tokens.count == 0:  # else every slab is written
            weight.zero_()
        elif tokens.count > plan.rows and dtype != torch.float32:
            slab = memory.empty((plan.columns, student.shape[1]), device)
    if needs.bias:
        bias = torch.zeros(inputs.vocabulary, dtype=torch.float32, device=device)

    for start, stop, first, last, buffer in _tiles(tokens.count, plan, inputs):
        part = tokens.part(first, last)
        tile = kernels.tile(part, start, stop, buffer, with_teacher=with_teacher)
        kernels.gradient(tile, part.of(statistics), part.of(term_weights))
        gradient = kernels.gradient_rows(tile.student)
        if entries is not None:
            entries.write_into(gradient, part.indices(device), start)
        if hidden is not None:
            made = kernels.head.hidden_gradient(gradient, start, stop)
            if inputs.weight is None:
                part.put(hidden[:, start:stop], made.to(dtype))
            else:
                places.part(first, last).add(hidden, made)
        if weight is not None:
            out = weight[start:stop]
            sums = out if slab is None else slab[: stop - start]  # dW of the rows so far
            kernels.head.weight_gradient(
                gradient,
                part.of(student),
                out=out if last == tokens.count else sums,
                add=None if first == 0 else sums,
            )
        if bias is not None:
            bias[start:stop] += gradient.sum(dim=0, dtype=torch.float32)
    if hidden is not None and is_summed_apart:
        hidden = _rounded(hidden, tokens, plan, student)
    return Gradients(hidden, weight, None if bias is None else bias.to(dtype))


def _rounded(sums: Tensor, tokens: Tokens, plan: TilePlan, like: Tensor) -> Tensor:
    """The sums [n, H] of some tokens as a gradient [N, H], without a second copy of them."""
    made = torch.zeros_like(like)
    for first in range(0, tokens.count, plan.rows):
        last = min(first + plan.rows, tokens.count)
        tokens.part(first, last).put(made, sums[first:last].to(like.dtype))
    return made


def _tiles(
    count: int, plan: TilePlan, inputs: LinearInputs
) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """Yield start and stop in the vocabulary, first and last (excluded) of `count` tokens, and the
    workspace of each tile."""
    vocabulary = inputs.vocabulary
    with memory.workspace(plan.heads * plan.rows * plan.columns, inputs.device) as buffer:
        for start in range(0, vocabulary, plan.columns):
            for first in range(0, count, plan.rows):
                last = min(first + plan.rows, count)
                yield start, min(start + plan.columns, vocabulary), first, last, buffer
