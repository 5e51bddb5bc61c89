"""What waits for the backward pass, so that it need not make the logits again.

A loss of single tokens, a mask that ranks tokens and log-probs do not know in their forward pass
what the gradient of a token will be multiplied by. For m models that are scored:

- Where all tokens fit one tile, their scores wait in the workspace: m + 1 GEMMs with a frozen head,
  m + 2 with a trained one.
- Else, with a frozen head and a single term, the gradient is made for a weight of 1 and multiplied
  later, because it is linear in the weight: m + 1 GEMMs, and [N, H] waits.
- With a gradient tolerance, where rows of scores have no room, the entries that it may leave wait
  (one_sweep.py): m GEMMs and sparse products.
- Else the backward pass makes the logits again (recompute.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfdistill_kernels.backends.interface import (
    Entries,
    Gradients,
    LinearInputs,
    Needs,
    rows_with_gradient,
)
from selfdistill_kernels.backends.lots import keys_of
from selfdistill_kernels.backends.native import memory, one_sweep, recompute, store
from selfdistill_kernels.backends.native.candidates import CandidatePlan
from selfdistill_kernels.backends.native.gemm import is_widened
from selfdistill_kernels.backends.native.plan import TilePlan
from selfdistill_kernels.backends.native.rounding import Rounder
from selfdistill_kernels.backends.native.rows import RowKernels, Tile
from selfdistill_kernels.backends.tokens import Tokens
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.tolerance import GradientTolerance, Rounding


class KeptScores:
    """The raw scores of every token that exists, for one backward pass.

    Args:
        kernels: the problem.
        plan: of strategy "store", with all tokens in one tile.
        lease: memory for it.
        statistics: [N, 10], filled for the tokens that exist.
    """

    def __init__(
        self, kernels: RowKernels, plan: TilePlan, lease: memory.Lease, statistics: Tensor
    ) -> None:
        self._plan, self._lease = plan, lease
        # One backward pass takes it, whatever thread it runs in.
        self._tiles = [store.score(kernels, plan, lease.space, statistics)]

    def top_k(self, inputs: LinearInputs, k: int, of_teacher: bool) -> Tensor:
        """See `Kept`."""
        scores = self._tiles[0].teacher if of_teacher else self._tiles[0].student
        return recompute.sweep_top_k(inputs, k, of_teacher, 0, scores)

    def gradient(
        self,
        inputs: LinearInputs,
        objective: Objective,
        statistics: Tensor,
        term_weights: Tensor,
        needs: Needs,
        entries: Entries | None = None,
        rounding: Rounding | None = None,
    ) -> Gradients | None:
        """See `Kept`. The scores become the gradient, and their memory is given back."""
        if is_widened(inputs.weight) != bool(self._plan.widened):
            return None  # oneDNN was switched on or off since
        try:
            tile = self._tiles.pop()
        except IndexError:
            return None
        try:
            chosen = rows_with_gradient(inputs, term_weights, entries)
            kernels = RowKernels(inputs, objective, self._plan.widened)
            tile = _compacted(tile, tile.tokens.of(chosen), term_weights)
            if rounding is not None:
                rounding.begin(hidden=needs.hidden, weight=needs.weight)
                rounder = Rounder(inputs, rounding)
                return store.round_and_multiply(
                    kernels, self._plan, self._lease.space, tile, needs, rounder,
                    statistics, term_weights.to(torch.float32),
                )  # fmt: skip
            kernels.gradient(tile, tile.tokens.of(statistics), tile.tokens.of(term_weights))
            if entries is not None:
                gradient = kernels.gradient_rows(tile.student)
                entries.write_into(gradient, tile.tokens.indices(inputs.device), 0)
            return store.multiply(kernels, self._plan, self._lease.space, tile, needs)
        finally:
            self._lease.release()


def _compacted(tile: Tile, chosen: Tensor, term_weights: Tensor) -> Tile:
    """The scores of the tokens chosen [n] bool, moved to the front."""
    order = torch.ops.selfdistill.gather_active_rows_(tile.student, chosen)
    count, teacher = order.numel(), tile.teacher
    if teacher is not None and not bool((term_weights[:, 0] != 0).any()):
        teacher = None  # no divergence has a gradient
    if teacher is not None:
        torch.ops.selfdistill.gather_active_rows_(teacher, chosen)
        teacher = teacher[:count]
    return Tile(tile.tokens.take(order), tile.student[:count], teacher, tile.start)


class KeptCandidates:
    """What a rounded gradient may be made from, of every token that exists, for one backward pass.

    Args:
        kernels: the problem.
        plan: with room for all tokens.
        lease: memory for it.
        tolerance: what is allowed.
        statistics: [N, 10], filled for the tokens that exist.
    """

    def __init__(
        self,
        kernels: RowKernels,
        plan: CandidatePlan,
        lease: memory.Lease,
        tolerance: GradientTolerance,
        statistics: Tensor,
    ) -> None:
        self._plan, self._lease = plan, lease
        inputs = kernels.inputs
        keys = keys_of(inputs, Tokens(inputs.student_hidden.shape[0]), tolerance.seed)
        # One backward pass takes them, whatever thread it runs in.
        self._found = [
            one_sweep.Candidates(
                kernels, plan, inputs.tokens, keys, tolerance.relative_error, lease.space
            )
        ]
        inputs.tokens.put(statistics, self._found[0].statistics)

    def top_k(self, inputs: LinearInputs, k: int, of_teacher: bool) -> None:
        """See `Kept`."""

    def gradient(
        self,
        inputs: LinearInputs,
        objective: Objective,
        statistics: Tensor,
        term_weights: Tensor,
        needs: Needs,
        entries: Entries | None = None,
        rounding: Rounding | None = None,
    ) -> Gradients | None:
        """See `Kept`. The memory is given back."""
        if rounding is None or is_widened(inputs.weight) != bool(self._plan.tiles.widened):
            return None
        try:
            candidates = self._found.pop()
        except IndexError:
            return None
        try:
            rounding.begin(hidden=needs.hidden, weight=needs.weight)
            tokens, plan = candidates.tokens, self._plan
            return one_sweep.settled(
                RowKernels(inputs, objective, plan.tiles.widened), plan, self._lease.space,
                candidates, needs, Rounder(inputs, rounding),
                tokens.of(statistics), tokens.of(term_weights.to(torch.float32)),
            )  # fmt: skip
        finally:
            self._lease.release()


class KeptProducts:
    """dH [N, H] of one term for a weight of 1.

    Args:
        hidden: [N, H], zeros where `active` is False.
        active: [N] bool, the tokens for which it was made.
        term: the column of `term_weights`.
    """

    def __init__(self, hidden: Tensor, active: Tensor, term: int) -> None:
        self._hidden, self._active, self._term = hidden, active, term

    def top_k(self, inputs: LinearInputs, k: int, of_teacher: bool) -> None:
        """See `Kept`."""

    def gradient(
        self,
        inputs: LinearInputs,
        objective: Objective,
        statistics: Tensor,
        term_weights: Tensor,
        needs: Needs,
        entries: Entries | None = None,
        rounding: Rounding | None = None,
    ) -> Gradients | None:
        """See `Kept`. Its error was noted when it was made: a weight changes no relative error."""
        weight = term_weights[:, self._term]
        wanted = rows_with_gradient(inputs, term_weights, entries)
        # A token that the gate stopped by a rounding, or another term.
        is_other = (wanted & ~self._active).any() or (
            term_weights[wanted].count_nonzero() != weight[wanted].count_nonzero()
        )
        if needs.weight or needs.bias or entries is not None or is_other:
            return None
        weight = weight.where(wanted, 0.0)
        if rounding is not None:
            rounding.table[:, :-1].masked_fill_(weight == 0, 0.0)
        weight = weight[:, None]
        # A weight of 0 is no gradient, whatever the row holds.
        made = torch.where(weight == 0, 0.0, weight * self._hidden)
        return Gradients(made.to(self._hidden.dtype), None, None)


def unit_objective(objective: Objective, term: int) -> Objective:
    """A loss of one term of a gradient with a weight of 1."""
    if term == 0:
        return Objective(objective.divergence, objective.beta, entry_clip=objective.entry_clip)
    return Objective("none", cross_entropy=float(term == 1), entropy=float(term == 2))
