"""What every backend receives and returns; one definition for the oracle, CPU and GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.tokens import Tokens
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.parallel.shard import VocabularyShard
from selfdistill_kernels.tolerance import Rounding


@dataclass(frozen=True)
class LinearInputs:
    """Hidden states and heads of N tokens, flattened and checked.

    Attributes:
        student_hidden: [N, H].
        teacher_hidden: [N, H_t], or None when only the student is wanted.
        weight: [V, H], the student's lm_head, or None when the hidden states are logits already.
        teacher_weight: [V, H_t], or None when the teacher shares `weight`.
        bias, teacher_bias: [V] or None.
        targets: [N] int64 or None; only read where `exists`.
        exists: [N] bool or None (all tokens exist). Rows that do not exist are never read.
        transform: bias -> scale -> soft cap -> temperature.
        shard: None where the heads are whole. Else they hold the shard's rows, V is the shard's
            size, and targets count from its start: one outside of [0, V) is another rank's.
    """

    student_hidden: Tensor
    teacher_hidden: Tensor | None
    weight: Tensor | None
    teacher_weight: Tensor | None
    bias: Tensor | None
    teacher_bias: Tensor | None
    targets: Tensor | None
    exists: Tensor | None
    transform: LogitTransform
    shard: VocabularyShard | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The first eight attributes, in the order of the operators' schemas."""
        return (
            self.student_hidden, self.teacher_hidden, self.weight, self.teacher_weight,
            self.bias, self.teacher_bias, self.targets, self.exists,
        )  # fmt: skip

    @property
    def teacher_head(self) -> Tensor | None:
        """[V, H_t], whichever head the teacher uses; None when its hidden states are logits."""
        return self.weight if self.teacher_weight is None else self.teacher_weight

    @property
    def vocabulary(self) -> int:
        """The size V of the vocabulary."""
        return self.student_hidden.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def whole_vocabulary(self) -> int:
        """V, or with a shard the entries of all ranks."""
        return self.vocabulary if self.shard is None else self.shard.vocabulary

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.student_hidden.device

    @functools.cached_property
    def tokens(self) -> Tokens:
        """The rows that are tokens; a GPU is waited for."""
        if self.exists is None:
            return Tokens(self.student_hidden.shape[0])
        return Tokens.where(self.exists)

    def existing_rows(self) -> Tensor:
        """[n] int64, the rows that are tokens; a GPU is waited for."""
        return self.tokens.indices(self.device)


@dataclass(frozen=True)
class Needs:
    """Which gradients the caller wants; a frozen weight costs no dW.

    `in_place`: the student's logits (hidden states without a weight) may be overwritten by their
    gradient, and `Gradients.hidden` may be that tensor.
    """

    hidden: bool
    weight: bool
    bias: bool
    in_place: bool = False

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


class Gradients(NamedTuple):
    """Gradients in the dtype of their inputs; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Entries(NamedTuple):
    """Elements of the gradient of the raw scores (of hidden @ weight.T) that are known already.

    Attributes:
        indices: [N, m] int64, vocabulary entries of each token; one that occurs twice has the same
            value both times. Not read in rows of zeros.
        values: [N, m], the gradient there, whatever the weights of the other terms.
    """

    indices: Tensor
    values: Tensor

    def write_into(self, gradient: Tensor, rows: Tensor, start: int) -> None:
        """Write what falls into gradient [r, c], the columns [start, start + c) of `rows` [r]."""
        columns = self.indices[rows] - start
        inside = (columns >= 0) & (columns < gradient.shape[1])
        row, entry = inside.nonzero(as_tuple=True)
        gradient[row, columns[row, entry]] = self.values[rows[row], entry].to(gradient.dtype)


class Expected(NamedTuple):
    """What is known in a forward pass of the gradient that its backward pass will ask for.

    Attributes:
        needs: the gradients that are wanted.
        terms: which of the columns of `term_weights` may hold something else than 0.
        gate: a token that it stops has no gradient.
        is_ranked: whether tokens are still to be chosen, so that many may have none.
    """

    needs: Needs
    terms: tuple[bool, bool, bool]
    gate: Gate | None
    is_ranked: bool

    @property
    def only_term(self) -> int | None:
        """The column, where there is one."""
        return self.terms.index(True) if sum(self.terms) == 1 else None


class Kept(Protocol):
    """What a sweep left for the backward pass of its tokens, so that it need not be repeated."""

    def top_k(self, inputs: LinearInputs, k: int, of_teacher: bool) -> Tensor | None:
        """`Backend.top_k` for the same models, before `gradient`; None if this is no help."""
        ...

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
        """`Backend.gradient` for the same models; None if this is no help, as it may be for a
        second backward pass."""
        ...


class Backend(Protocol):
    """The visits of the vocabulary that the operators are made of.

    `statistics` tensors are [N, 10] (see statistics.Column), zero in rows that do not exist. With
    `inputs.shard`, which does not reach `visit`, they are those of the whole vocabulary; the most
    likely entries and the gradients are those of the shard, dH what its entries add to the whole.
    """

    def statistics(self, inputs: LinearInputs, objective: Objective, workspace: int) -> Tensor:
        """One sweep, no gradient."""
        ...

    def keep(
        self,
        inputs: LinearInputs,
        objective: Objective,
        expected: Expected,
        workspace: int,
        rounding: Rounding | None = None,
    ) -> tuple[Tensor, Kept] | None:
        """`statistics`, and what spares their gradient a sweep; None where that cannot be had."""
        ...

    def top_k(self, inputs: LinearInputs, k: int, of_teacher: bool, workspace: int) -> Tensor:
        """[N, k] int64, the most likely vocabulary entries of each token in any order; 0 where no
        token exists."""
        ...

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
        """Gradient of sum_i w_i0 divergence_i + w_i1 (-log S(y_i)) + w_i2 H(S_i), with `entries`
        in place of what that gives there.

        `term_weights` is [N, 3]; without targets w_i1 weighs log sum exp z_i. Rows where everything
        is zero cost nothing. `rounding` is what it may be wrong by; never with `entries`.
        """
        ...

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
        """Statistics [N, 10], active tokens [N] bool and the gradient of
        sum_i active_i loss_weight_i loss_i, where everything is known before the visit."""
        ...


def rows_with_gradient(
    inputs: LinearInputs, term_weights: Tensor, entries: Entries | None
) -> Tensor:
    """[N] bool, the existing tokens with a weight or an entry that is not 0."""
    chosen = (term_weights != 0).any(dim=1)
    if entries is not None:
        chosen |= (entries.values != 0).any(dim=1)
    return chosen if inputs.exists is None else chosen & inputs.exists
