"""The compiled row kernels of csrc/, bound to one problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.native.gemm import Head, head_for
from selfdistill_kernels.backends.native.state import add_second_sums, join_parts
from selfdistill_kernels.backends.tokens import Tokens
from selfdistill_kernels.objective import DIVERGENCES, Objective
from selfdistill_kernels.token_loss import active_tokens, term_weights_of

NO_GATE = Gate(sign=-2, threshold=0.0)
# Which terms of a loss may have a gradient: the divergence, -log S(y), the entropy.
LossTerms = tuple[bool, bool, bool]
STATE_COLUMNS = 19  # of the float64 streaming state, csrc/divergence.h


@dataclass(frozen=True)
class Tile:
    """Raw scores of r tokens for the vocabulary entries [start, start + c).

    Attributes:
        tokens: the r tokens.
        student: [r, c] float32.
        teacher: [r, c] float32 or None.
        start: first vocabulary entry.
    """

    tokens: Tokens
    student: Tensor
    teacher: Tensor | None
    start: int


class RowKernels:
    """Makes tiles of logits and runs the row kernels over them.

    Args:
        inputs: the problem.
        objective: the loss of a token.
        widened: columns of a head that are widened at a time, where its products need that.
    """

    def __init__(self, inputs: LinearInputs, objective: Objective, widened: int) -> None:
        self.inputs = inputs
        self.objective = objective
        # On a GPU nothing may wait for a number of rows that only the device knows.
        self.asynchronous = inputs.student_hidden.is_cuda
        self.divergence = DIVERGENCES[objective.kernel_divergence]
        self.head: Head = head_for(inputs.weight, widened)
        self.teacher_head: Head = (
            self.head if inputs.teacher_weight is None else head_for(inputs.teacher_weight, widened)
        )
        self.entry_clip = objective.entry_clip if self.divergence != DIVERGENCES["none"] else None
        transform = inputs.transform
        self.transform = (transform.logit_scale, transform.softcap or 0.0, transform.temperature)
        self._bias = None if inputs.bias is None else inputs.bias.to(torch.float32)
        self._teacher_bias = (
            None if inputs.teacher_bias is None else inputs.teacher_bias.to(torch.float32)
        )

    @property
    def needs_mixture(self) -> bool:
        """True when the divergence needs both normalisers before its own sweep."""
        return self.divergence >= DIVERGENCES["jsd"]

    @property
    def needs_second_sweep(self) -> bool:
        """The same, or which entries are clipped."""
        return self.needs_mixture or self.entry_clip is not None

    def tile(
        self, tokens: Tokens, start: int, stop: int, buffer: Tensor, *, with_teacher: bool
    ) -> Tile:
        """Raw scores of `tokens` in the front of a flat `buffer`, the student's before the
        teacher's."""
        inputs, count, columns = self.inputs, tokens.count, stop - start
        student = tokens.of(inputs.student_hidden)
        if inputs.teacher_hidden is None or not with_teacher:
            scores = buffer[: count * columns].view(count, columns)
            self.head.logits(student, start, stop, out=scores)
            return Tile(tokens, scores, None, start)
        both = buffer[: 2 * count * columns].view(2 * count, columns)
        first, second = both[:count], both[count:]
        if inputs.weight is None or inputs.teacher_weight is not None:
            self.head.logits(student, start, stop, out=first)
            del student  # a copy, where tokens are gathered
            self.teacher_head.logits(tokens.of(inputs.teacher_hidden), start, stop, out=second)
            return Tile(tokens, first, second, start)
        # One reading of the head serves both.
        teacher = tokens.of(inputs.teacher_hidden)
        self.head.logits(torch.cat([student, teacher]), start, stop, out=both)
        if not self.asynchronous:
            _share_scores(student, teacher, first, second)
        return Tile(tokens, first, second, start)

    def visit(
        self,
        tile: Tile,
        loss_weight: Tensor | None,
        gate: Gate | None,
        old_logprobs: Tensor | None,
        *,
        statistics: Tensor,
        active: Tensor,
    ) -> None:
        """One visit of whole rows: fills statistics [r, 10] and leaves in active [r] bool those
        that have a gradient; with `loss_weight` [r] their student's scores become gradients."""
        # The rows of a GPU clip entries from statistics only: they stay in no cache on the way.
        clips_later = self.asynchronous and self.entry_clip is not None
        if clips_later and loss_weight is None:
            ones = torch.ones_like(statistics[:, 0])
            statistics.copy_(self.statistics(tile))
            active &= active_tokens(statistics, ones, None, gate)
            return
        if loss_weight is not None and (clips_later or self.objective.needs_statistics_first):
            self._visit_twice(tile, loss_weight, gate, old_logprobs, statistics, active)
            return
        objective, kernel_gate = self.objective, gate or NO_GATE
        torch.ops.selfdistill.row_visit_(
            tile.student, tile.teacher, *self._biases(tile), self._targets(tile), loss_weight,
            *self.transform, self.divergence, objective.beta, objective.policy_gradient,
            objective.cross_entropy, objective.entropy, kernel_gate.sign, kernel_gate.threshold,
            self.head.narrow_gradient,
            statistics, active, self.entry_clip or 0.0,
        )  # fmt: skip

    def keep_active(self, tile: Tile, active: Tensor, gate: Gate | None) -> Tokens:
        """Move the gradients of active rows [r] to the front of a visited tile; return their
        tokens. Without a gate a GPU keeps all rows: those without a weight are zeros there."""
        if self.asynchronous and gate is None:
            return tile.tokens
        order = torch.ops.selfdistill.gather_active_rows_(tile.student, active)
        return tile.tokens.take(order)

    def _visit_twice(
        self,
        tile: Tile,
        loss_weight: Tensor,
        gate: Gate | None,
        old_logprobs: Tensor | None,
        statistics: Tensor,
        active: Tensor,
    ) -> None:
        """`visit` for weights that depend on the row's own statistics: the tile is read again
        (a few percent of its GEMMs)."""
        weights = self.weigh(
            tile, loss_weight, gate, old_logprobs, statistics=statistics, active=active
        )
        self.gradient(tile, statistics, weights)

    def weigh(
        self,
        tile: Tile,
        loss_weight: Tensor,
        gate: Gate | None,
        old_logprobs: Tensor | None,
        *,
        statistics: Tensor,
        active: Tensor,
    ) -> Tensor:
        """`visit` without a gradient, for which it returns the weights [r, 3] of the terms."""
        statistics.copy_(self.statistics(tile))
        active &= active_tokens(statistics, loss_weight, None, gate)
        return term_weights_of(self.objective, statistics, loss_weight * active, old_logprobs)

    def statistics(self, tile: Tile) -> Tensor:
        """Statistics [r, 10] of whole rows; their scores stay as they are, unlike in `visit`."""
        state = self.new_state(tile.tokens.count)
        self.accumulate(tile, state)
        state = self.joined(state)
        if self.needs_second_sweep:
            self.accumulate_second(tile, state)
            self.join_second(state)
        return self.finish(state)

    def new_state(self, count: int) -> Tensor:
        """Streaming state of `count` tokens, to be filled by `accumulate`."""
        return torch.empty((count, STATE_COLUMNS), dtype=torch.float64, device=self.inputs.device)

    def accumulate(self, tile: Tile, state: Tensor) -> None:
        """First sweep: merge a slab into `state` [r, 19]."""
        torch.ops.selfdistill.row_statistics_(
            tile.student, tile.teacher, *self._biases(tile), self._targets(tile),
            *self.transform, self.divergence, tile.start, tile.start == 0, state,
        )  # fmt: skip

    def accumulate_second(self, tile: Tile, state: Tensor) -> None:
        """Second sweep, of the mixture divergences and of clipped entries."""
        operands = (
            tile.student, tile.teacher, *self._biases(tile),
            *self.transform, self.divergence, self.objective.beta,
        )  # fmt: skip
        if self.needs_mixture:
            torch.ops.selfdistill.row_mixture_(*operands, state)
        if self.entry_clip is not None:
            torch.ops.selfdistill.row_clip_(*operands, self.entry_clip, state)

    def joined(self, state: Tensor) -> Tensor:
        """The state [r, 19] of the vocabulary between the sweeps, with what other ranks have."""
        shard = self.inputs.shard
        return state if shard is None else join_parts(state, self.divergence, shard)

    def join_second(self, state: Tensor) -> None:
        """Add what the second sweep of other ranks has found."""
        if self.inputs.shard is not None:
            clips = self.entry_clip is not None
            add_second_sums(state, self.inputs.shard, mixture=self.needs_mixture, clips=clips)

    def finish(self, state: Tensor) -> Tensor:
        """Statistics [r, 10] from a state that has seen the whole vocabulary."""
        inputs = self.inputs
        has_teacher, has_targets = inputs.teacher_hidden is not None, inputs.targets is not None
        return torch.ops.selfdistill.row_finish(
            state, has_teacher, has_targets, self.divergence, self.objective.beta
        )

    def gradient(self, tile: Tile, statistics: Tensor, term_weights: Tensor) -> None:
        """The student's scores of a slab become gradients, from statistics [r, 10] and weights
        [r, 3] of its tokens."""
        torch.ops.selfdistill.row_gradient_(
            tile.student, tile.teacher, *self._biases(tile), self._targets(tile),
            statistics, term_weights, *self.transform,
            0 if tile.teacher is None else self.divergence, self.objective.beta, tile.start,
            self.head.narrow_gradient, 0.0 if tile.teacher is None else self.entry_clip or 0.0,
        )  # fmt: skip

    def round(
        self,
        tile: Tile,
        statistics: Tensor,
        term_weights: Tensor,
        *rounding: Tensor | float | None,
    ) -> None:
        """The student's scores of whole rows become rounded gradients; `rounding` is the rest of
        what `row_round_` takes."""
        torch.ops.selfdistill.row_round_(
            tile.student, tile.teacher, *self._biases(tile), self._targets(tile),
            statistics, term_weights, *self.transform,
            0 if tile.teacher is None else self.divergence, self.objective.beta,
            self.head.narrow_gradient, *rounding,
        )  # fmt: skip

    def emit(
        self,
        tile: Tile,
        state: Tensor,
        terms: LossTerms,
        keys: Tensor,
        floor: float,
        *candidates: Tensor,
    ) -> None:
        """A slab, which `state` [r, 19] has seen, adds to the candidates of its tokens for a
        gradient of some `terms` of the loss; `candidates` is the rest of what `row_emit_` takes."""
        divergence, _, entropy = terms
        torch.ops.selfdistill.row_emit_(
            tile.student, tile.teacher if divergence else None, *self._biases(tile),
            self._targets(tile), *self.transform, self.divergence if divergence else 0, entropy,
            tile.start, state, keys, floor, *candidates,
        )  # fmt: skip

    def settle(
        self,
        tokens: Tokens,
        terms: LossTerms,
        candidates: tuple[Tensor, Tensor, Tensor],
        statistics: Tensor,
        term_weights: Tensor,
        *rounding: Tensor | float,
    ) -> None:
        """The candidates of tokens become rounded gradients; `rounding` is the rest of what
        `row_settle_` takes."""
        targets = self.inputs.targets
        torch.ops.selfdistill.row_settle_(
            *candidates, None if targets is None else tokens.of(targets), statistics, term_weights,
            *self.transform, self.divergence if terms[0] else 0, self.objective.beta, *rounding,
        )  # fmt: skip

    def gradient_rows(self, scores: Tensor) -> Tensor:
        """The gradient [r, c] that `visit` or `gradient` left in rows [r, c] of scores."""
        if not self.head.narrow_gradient:
            return scores
        return scores.view(torch.bfloat16)[:, : scores.shape[1]]

    def _targets(self, tile: Tile) -> Tensor | None:
        return None if self.inputs.targets is None else tile.tokens.of(self.inputs.targets)

    def _biases(self, tile: Tile) -> tuple[Tensor | None, Tensor | None]:
        part = slice(tile.start, tile.start + tile.student.shape[1])
        return (
            None if self._bias is None else self._bias[part],
            None if self._teacher_bias is None else self._teacher_bias[part],
        )


def _share_scores(student: Tensor, teacher: Tensor, first: Tensor, second: Tensor) -> None:
    """Give a teacher with the student's hidden states [r, H] the student's scores [r, c].

    A row of a product has other last bits in another place of it, by the library and the processor;
    equal distributions would differ by a rounding, and their loss would not be exactly 0. On a GPU
    every row of a product is summed in one order.
    """
    # Few rows agree in their first element: a look at one column spares one at all of them.
    if not (student[:, 0] == teacher[:, 0]).any():
        return
    same = (student == teacher).all(dim=1)
    if same.any():
        torch.where(same[:, None], first, second, out=second)
