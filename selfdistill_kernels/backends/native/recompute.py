"""Strategy `recompute`: slabs of the vocabulary outermost, one sweep for statistics and one for
gradients (and one for the most likely entries, where an objective asks for them).

Workspace: a tile [r, c] of logits for each model. In the gradient sweep each slab of dW is complete
after its tiles and written once, so no [V, H] accumulator exists whatever the input dtype. 16-bit
inputs need float32 sums beside the tile: dH [n, H], over the slabs, and a slab of dW [c, H], over
the tiles of tokens where there are several. Only tokens with a weight take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdistill_kernels.backends.interface import Entries, Gradients, LinearInputs, Needs
from selfdistill_kernels.backends.native import memory
from selfdistill_kernels.backends.native.gemm import head_for, is_widened
from selfdistill_kernels.backends.native.plan import TilePlan
from selfdistill_kernels.backends.native.rows import RowKernels, Tile
from selfdistill_kernels.backends.tokens import Tokens

# What looks at a tile of the rows [first, last) when its part [r, 19] of the state has seen it.
Watch = Callable[[Tile, int, int, Tensor], None]


def sweep_statistics(kernels: RowKernels, plan: TilePlan) -> Tensor:
    """Statistics [n, 10] of the n tokens that exist."""
    with memory.workspace(plan.tile_elements, kernels.inputs.device) as buffer:
        return statistics_of(kernels, plan, kernels.inputs.tokens, buffer, None)


def statistics_of(
    kernels: RowKernels, plan: TilePlan, tokens: Tokens, buffer: Tensor, watch: Watch | None
) -> Tensor:
    """Statistics [n, 10] of some tokens; `watch` sees the tiles of the last sweep."""
    state = kernels.new_state(tokens.count)

    def sweep(accumulate: Callable[[Tile, Tensor], None], watch: Watch | None) -> None:
        for start, stop, first, last in _tiles(tokens.count, plan, kernels.inputs):
            part = tokens.part(first, last)
            tile = kernels.tile(part, start, stop, buffer, with_teacher=True)
            accumulate(tile, state[first:last])
            if watch is not None:
                watch(tile, first, last, state[first:last])

    sweep(kernels.accumulate, None if kernels.needs_second_sweep else watch)
    state = kernels.joined(state)
    if kernels.needs_second_sweep:
        sweep(kernels.accumulate_second, watch)
        kernels.join_second(state)
    return kernels.finish(state)


def sweep_top_k(
    inputs: LinearInputs, k: int, of_teacher: bool, workspace: int, scores: Tensor | None = None
) -> Tensor:
    """`Backend.top_k` by library GEMMs, one model alone, or from its raw scores [n, V]."""
    tokens = inputs.tokens
    hidden = inputs.teacher_hidden if of_teacher else inputs.student_hidden
    bias = inputs.teacher_bias if of_teacher else inputs.bias
    assert hidden is not None
    weight = inputs.teacher_head if of_teacher else inputs.weight
    plan = TilePlan.slabs(
        tokens=tokens.count,
        hidden=hidden.shape[1],
        vocabulary=inputs.vocabulary,
        models=1,
        itemsize=hidden.element_size(),
        on_gpu=hidden.is_cuda,
        workspace=workspace,
        row_bytes=0 if weight is None else None,
        widened_hidden=hidden.shape[1] if is_widened(weight) else 0,
    )
    head = head_for(weight, plan.widened)
    # Of a slab only the k best of each token remain, so memory does not grow with the vocabulary.
    found = hidden.new_zeros((hidden.shape[0], k), dtype=torch.int64)
    best = hidden.new_empty((tokens.count, 0), dtype=torch.float32)
    entries = found.new_empty((tokens.count, 0))
    merged: list[tuple[Tensor, Tensor]] = []
    with memory.workspace(plan.tile_elements, inputs.device) as buffer:
        for start, stop, first, last in _tiles(tokens.count, plan, inputs):
            rows, columns = last - first, stop - start
            tile = buffer[: rows * columns].view(rows, columns)
            if scores is None:
                head.logits(tokens.part(first, last).of(hidden), start, stop, out=tile)
            else:
                tile.copy_(scores[first:last, start:stop])
            if bias is not None:
                tile += bias[start:stop]
            # Scale and cap keep the order of scores, or turn it round, so neither is applied.
            if inputs.transform.logit_scale < 0:
                tile.neg_()
            top = tile.topk(min(k, stop - start), dim=1, sorted=False)
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
    with memory.workspace(plan.elements, kernels.inputs.device) as space:
        sweep = GradientSweep(kernels, tokens, plan, needs, space)
        return sweep.run(statistics, term_weights, entries)


@dataclass(frozen=True)
class Shared:
    """Gradients that others have a part in.

    Attributes:
        hidden: [N, H] where dH goes, zeros for the tokens of the sweep; None if it is not wanted.
        weight: [V, H] where dW goes, in the dtype of the inputs or float32; None for a frozen head.
        bias: [V] float32, to which db is added, or None.
        begin: writes the part of others in dW of the columns from `start` on to [c, H] float32.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    begin: Callable[[int, Tensor], None]


class GradientSweep:
    """The gradients of some tokens, and the float32 sums that lie beside the tile until each is
    complete.

    Args:
        kernels: the problem.
        tokens: those with a gradient.
        plan: of strategy "recompute".
        needs: the gradients that are wanted.
        space: memory of plan.elements.
        shared: where the gradients go, if others have a part in them.
    """

    def __init__(
        self,
        kernels: RowKernels,
        tokens: Tokens,
        plan: TilePlan,
        needs: Needs,
        space: Tensor,
        shared: Shared | None = None,
    ) -> None:
        inputs, student = kernels.inputs, kernels.inputs.student_hidden
        size, dtype = student.shape[1], student.dtype
        self._kernels, self._inputs, self._tokens, self._plan = kernels, inputs, tokens, plan
        self._buffer, sums = space[: plan.tile_elements], space[plan.tile_elements :]
        self._hidden: Tensor | None = None
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._slab: Tensor | None = None
        self._shared = shared
        # Where the sums of dH lie: in dH itself, or for 16-bit inputs in float32 [n, H]. Logits of
        # a caller get each element of their gradient once.
        self._is_summed_apart = inputs.weight is not None and dtype != torch.float32
        self._places = Tokens(tokens.count) if self._is_summed_apart else tokens
        if needs.hidden and self._is_summed_apart:
            elements = tokens.count * size
            self._hidden = sums[:elements].view(tokens.count, size).zero_()
            sums = sums[elements:]
        elif needs.hidden:
            self._hidden = torch.zeros_like(student) if shared is None else shared.hidden
        if shared is not None:
            self._weight, self._bias = shared.weight, shared.bias
        elif needs.weight:
            assert inputs.weight is not None
            self._weight = memory.empty(inputs.weight.shape, inputs.device, dtype)
            if tokens.count == 0:  # else every slab is written
                self._weight.zero_()
        if needs.bias and shared is None:
            self._bias = torch.zeros(inputs.vocabulary, device=inputs.device)
        has_parts = tokens.count > plan.rows or (shared is not None and tokens.count > 0)
        if has_parts and self._weight is not None and self._weight.dtype != torch.float32:
            self._slab = sums[: plan.columns * size].view(plan.columns, size)

    def run(self, statistics: Tensor, term_weights: Tensor, entries: Entries | None) -> Gradients:
        """Visit every tile once."""
        kernels, inputs, tokens = self._kernels, self._inputs, self._tokens
        with_teacher = inputs.teacher_hidden is not None and bool((term_weights[:, 0] != 0).any())
        for start, stop, first, last in _tiles(tokens.count, self._plan, inputs):
            part = tokens.part(first, last)
            tile = kernels.tile(part, start, stop, self._buffer, with_teacher=with_teacher)
            kernels.gradient(tile, part.of(statistics), part.of(term_weights))
            gradient = kernels.gradient_rows(tile.student)
            if entries is not None:
                entries.write_into(gradient, part.indices(inputs.device), start)
            self._add(gradient, start, stop, first, last)
        hidden, bias = self._hidden, self._bias
        if hidden is not None and self._is_summed_apart:
            whole = None if self._shared is None else self._shared.hidden
            if whole is None:
                whole = torch.zeros_like(inputs.student_hidden)
            hidden = _put_rounded(hidden, tokens, self._plan, whole)
        dtype = inputs.student_hidden.dtype
        return Gradients(hidden, self._weight, None if bias is None else bias.to(dtype))

    def _add(self, gradient: Tensor, start: int, stop: int, first: int, last: int) -> None:
        """Multiply the gradient [r, c] of the tokens [first, last) and columns [start, stop)."""
        inputs, tokens, head = self._inputs, self._tokens, self._kernels.head
        if self._hidden is not None:
            made = head.hidden_gradient(gradient, start, stop)
            if inputs.weight is None:
                part = tokens.part(first, last)
                part.put(self._hidden[:, start:stop], made.to(self._hidden.dtype))
            else:
                self._places.part(first, last).add(self._hidden, made)
            del made
        if self._weight is not None:
            out = self._weight[start:stop]
            # dW of the rows so far: in dW itself, or in float32.
            sums = out if self._slab is None else self._slab[: stop - start]
            if first == 0 and self._shared is not None:
                self._shared.begin(start, sums)
            head.weight_gradient(
                gradient,
                tokens.part(first, last).of(inputs.student_hidden),
                out=out if last == tokens.count else sums,
                add=None if first == 0 and self._shared is None else sums,
            )
        if self._bias is not None:
            self._bias[start:stop] += gradient.sum(dim=0, dtype=torch.float32)


def _put_rounded(sums: Tensor, tokens: Tokens, plan: TilePlan, made: Tensor) -> Tensor:
    """Put the sums [n, H] of some tokens into a gradient [N, H], without a second copy."""
    for first in range(0, tokens.count, plan.rows):
        last = min(first + plan.rows, tokens.count)
        tokens.part(first, last).put(made, sums[first:last].to(made.dtype))
    return made


def _tiles(count: int, plan: TilePlan, inputs: LinearInputs) -> Iterator[tuple[int, int, int, int]]:
    """Yield start and stop in the vocabulary, first and last (excluded) of `count` tokens."""
    for start in range(0, inputs.vocabulary, plan.columns):
        for first in range(0, count, plan.rows):
            last = min(first + plan.rows, count)
            yield start, min(start + plan.columns, inputs.vocabulary), first, last
