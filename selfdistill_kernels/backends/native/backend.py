"""Library GEMMs around the compiled row kernels of csrc/, on the CPU or on a GPU.

On a GPU one visit waits for the device where it must know a number of rows: once for the tokens
that exist, once a tile with an advantage mask, once a call in a backward pass that recomputes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.interface import (
    Entries,
    Expected,
    Gradients,
    Kept,
    LinearInputs,
    Needs,
    rows_with_gradient,
)
from selfdistill_kernels.backends.native import memory, one_sweep, recompute, store
from selfdistill_kernels.backends.native.candidates import CAPACITIES, CandidatePlan
from selfdistill_kernels.backends.native.gemm import is_widened
from selfdistill_kernels.backends.native.kept import (
    KeptCandidates,
    KeptProducts,
    KeptScores,
    unit_objective,
)
from selfdistill_kernels.backends.native.plan import TilePlan, copied_bytes, widened_bytes
from selfdistill_kernels.backends.native.rounding import Rounder
from selfdistill_kernels.backends.native.rows import LossTerms, RowKernels
from selfdistill_kernels.backends.tokens import Tokens
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.statistics import Column
from selfdistill_kernels.token_loss import active_tokens, term_weights_of
from selfdistill_kernels.tolerance import Rounding

NO_NEEDS = Needs(False, False, False)
# With so many whole rows of logits at a time a rounded gradient is made fastest from them.
ENOUGH_ROWS = 32
# Where products are fast, one sweep pays with so many candidates only, because of the tokens that
# have no room with fewer (docs/decisions).
FAST_CAPACITY = CAPACITIES[0]
# Tokens of a tile on a GPU: its GEMMs read the head, and add to dW, seldom enough (docs/math.md).
GPU_TOKENS = 2048


class NativeBackend:
    """float32 and bfloat16 inputs; on a GPU float16 too."""

    def statistics(self, inputs: LinearInputs, objective: Objective, workspace: int) -> Tensor:
        statistics = _new_statistics(inputs)
        # A shard's rows are not finished when they have been visited: other ranks have the rest.
        plan = (
            plan_for(inputs, NO_NEEDS, workspace)
            if inputs.shard is None
            else slabs_for(inputs, inputs.tokens.count, NO_NEEDS, workspace)
        )
        kernels = RowKernels(inputs, objective, plan.widened)
        if plan.strategy == "recompute":
            inputs.tokens.put(statistics, recompute.sweep_statistics(kernels, plan))
        else:
            store.visit(
                kernels, plan,
                gate=None, loss_weight=None, old_logprobs=None, needs=NO_NEEDS,
                statistics=statistics,
            )  # fmt: skip
        return statistics

    def keep(
        self,
        inputs: LinearInputs,
        objective: Objective,
        expected: Expected,
        workspace: int,
        rounding: Rounding | None = None,
    ) -> tuple[Tensor, Kept] | None:
        # Logits of a caller cost no product, whoever looks at them again. On a GPU memory is dearer
        # than a product, and the number of tokens would be waited for.
        if inputs.weight is None or inputs.device.type != "cpu":
            return None
        # Raises where the workspace is too small for a backward pass that nothing waits for: that
        # must not depend on who holds the memory, least of all on one of several ranks.
        slabs_for(inputs, inputs.student_hidden.shape[0], expected.needs, workspace)
        made = plan_for if rounding is None else rounding_plan_for
        plan, candidates = made(inputs, expected.needs, workspace), None
        if rounding is not None:
            candidates = candidate_plan_for(
                inputs, expected.needs, workspace, expected.terms, rounding
            )
        if candidates is not None:
            lease = None
            if rounding is not None and candidates.tokens >= inputs.tokens.count:
                lease = memory.lease(candidates.elements, inputs.device)
            if rounding is not None and lease is not None:
                statistics = _new_statistics(inputs)
                kernels = RowKernels(inputs, objective, candidates.tiles.widened)
                kept = KeptCandidates(kernels, candidates, lease, rounding.tolerance, statistics)
                return statistics, kept
        elif plan is None or plan.strategy != "store":
            return None
        elif plan.rows >= inputs.tokens.count:
            lease = memory.lease(plan.elements, inputs.device)
            if lease is not None:
                statistics = _new_statistics(inputs)
                kernels = RowKernels(inputs, objective, plan.widened)
                return statistics, KeptScores(kernels, plan, lease, statistics)
        if inputs.shard is not None:  # a visit cannot finish its rows
            return None
        term = expected.only_term
        # The gradient of a top-k divergence is not that of the kernels.
        is_foreign = term == 0 and objective.divergence == "none"
        if (
            expected.needs != Needs(True, False, False)
            or expected.is_ranked
            or term is None
            or is_foreign
        ):
            return None
        statistics, active, gradients = self.visit(
            inputs, unit_objective(objective, term), expected.gate,
            inputs.student_hidden.new_ones(inputs.student_hidden.shape[0], dtype=torch.float32),
            None, expected.needs, workspace, rounding,
        )  # fmt: skip
        assert gradients.hidden is not None
        return statistics, KeptProducts(gradients.hidden, active, term)

    def top_k(self, inputs: LinearInputs, k: int, of_teacher: bool, workspace: int) -> Tensor:
        return recompute.sweep_top_k(inputs, k, of_teacher, workspace)

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
        plan, rounder = plan_for(inputs, needs, workspace), None
        loss_weight = loss_weight.to(torch.float32)
        statistics = _new_statistics(inputs)
        if rounding is not None:
            rounding.begin(hidden=needs.hidden, weight=needs.weight)
            candidates = candidate_plan_for(inputs, needs, workspace, objective.terms, rounding)
            rounded = rounding_plan_for(inputs, needs, workspace)
            if candidates is not None and needs:
                active, gradients = _visit_once(
                    RowKernels(inputs, objective, candidates.tiles.widened), candidates,
                    Rounder(inputs, rounding), gate, loss_weight, old_logprobs, needs, statistics,
                )  # fmt: skip
                return statistics, active, gradients
            if rounded is not None and needs:
                plan, rounder = rounded, Rounder(inputs, rounding)
        kernels = RowKernels(inputs, objective, plan.widened)
        if plan.strategy == "store":
            active, gradients = store.visit(
                kernels, plan,
                gate=gate, loss_weight=loss_weight, old_logprobs=old_logprobs,
                needs=needs, statistics=statistics,
                rounder=rounder,
            )  # fmt: skip
            return statistics, active, gradients
        inputs.tokens.put(statistics, recompute.sweep_statistics(kernels, plan))
        active = active_tokens(statistics, loss_weight, inputs.exists, gate)
        weights = term_weights_of(objective, statistics, loss_weight * active, old_logprobs)
        return statistics, active, _recomputed(kernels, statistics, weights, needs, workspace)

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
        # Whether a budget is enough must not depend on how many tokens have a gradient today.
        plan = slabs_for(inputs, inputs.student_hidden.shape[0], needs, workspace)
        if rounding is not None:
            rounding.begin(hidden=needs.hidden, weight=needs.weight)
            terms = _terms_of(term_weights)
            candidates = candidate_plan_for(inputs, needs, workspace, terms, rounding)
            if candidates is not None and needs:
                weights = term_weights.to(torch.float32)
                return one_sweep.gradients(
                    RowKernels(inputs, objective, candidates.tiles.widened), candidates,
                    Tokens.where(rows_with_gradient(inputs, term_weights, None)), needs,
                    Rounder(inputs, rounding),
                    lambda tokens, _: (tokens.of(statistics), tokens.of(weights)),
                )  # fmt: skip
            whole = rounding_plan_for(inputs, needs, workspace)
            if whole is not None and needs:
                return store.rounded_gradients(
                    RowKernels(inputs, objective, whole.widened), whole,
                    Tokens.where(rows_with_gradient(inputs, term_weights, None)), needs,
                    Rounder(inputs, rounding), statistics, term_weights.to(torch.float32),
                )  # fmt: skip
        kernels = RowKernels(inputs, objective, plan.widened)
        return _recomputed(kernels, statistics, term_weights, needs, workspace, entries)


def _visit_once(
    kernels: RowKernels,
    plan: CandidatePlan,
    rounder: Rounder,
    gate: Gate | None,
    loss_weight: Tensor,
    old_logprobs: Tensor | None,
    needs: Needs,
    statistics: Tensor,
) -> tuple[Tensor, Gradients]:
    """`visit` by one sweep; fills statistics [N, 10]."""
    inputs = kernels.inputs
    active = loss_weight.new_zeros(loss_weight.shape, dtype=torch.bool)

    def weigh(tokens: Tokens, found: Tensor) -> tuple[Tensor, Tensor]:
        weight = tokens.of(loss_weight)
        chosen = active_tokens(found, weight, None, gate)
        tokens.put(statistics, found)
        tokens.put(active, chosen)
        old = None if old_logprobs is None else tokens.of(old_logprobs)
        return found, term_weights_of(kernels.objective, found, weight * chosen, old)

    return active, one_sweep.gradients(kernels, plan, inputs.tokens, needs, rounder, weigh)


def _terms_of(term_weights: Tensor) -> LossTerms:
    """Which of the columns of [N, 3] hold something else than 0."""
    divergence, likelihood, entropy = (term_weights != 0).any(dim=0).tolist()
    return divergence, likelihood, entropy


def _recomputed(
    kernels: RowKernels,
    statistics: Tensor,
    term_weights: Tensor,
    needs: Needs,
    workspace: int,
    entries: Entries | None = None,
) -> Gradients:
    """Return the gradients of tokens with a weight or an entry, whose logits are made again."""
    if not needs:
        return Gradients(None, None, None)
    inputs = kernels.inputs
    tokens = Tokens.where(rows_with_gradient(inputs, term_weights, entries))
    return recompute.sweep_gradients(
        kernels,
        tokens,
        slabs_for(inputs, tokens.count, needs, workspace),
        statistics=statistics,
        term_weights=term_weights.to(torch.float32),
        entries=entries,
        needs=needs,
    )


def plan_for(inputs: LinearInputs, needs: Needs, workspace: int) -> TilePlan:
    """Plan the tiles of one visit."""
    if workspace == 0 and inputs.student_hidden.is_cuda:
        workspace = _gpu_workspace(inputs, needs)
    return TilePlan.choose(**_problem(inputs, inputs.tokens.count, needs), workspace=workspace)


def rounding_plan_for(inputs: LinearInputs, needs: Needs, workspace: int) -> TilePlan | None:
    """The plan for rounded gradients; None where their rows would not be whole, or a 16-bit dW has
    no room for its float32 sums."""
    plan = plan_for(inputs, needs, workspace)
    if plan.strategy != "store":
        return None
    if needs.weight and inputs.student_hidden.element_size() < 4 and not plan.sum_bytes:
        sums = 4 * inputs.vocabulary * inputs.student_hidden.shape[1]
        plan = replace(plan, sum_bytes=sums)
        if workspace and plan.bytes > workspace:
            return None
    return plan


def candidate_plan_for(
    inputs: LinearInputs, needs: Needs, workspace: int, terms: LossTerms, rounding: Rounding
) -> CandidatePlan | None:
    """The plan for one sweep; None where whole rows are better, or it has no room.

    Bounds are made from all entries, which one sweep does not keep.
    """
    if rounding.tolerance.bound_risk is not None:
        return None
    problem = _problem(inputs, max(inputs.tokens.count, 1), needs)
    # Products in 16 bits take less time than looking for candidates: few rows are no loss.
    is_fast = problem["itemsize"] < 4 and not problem["widened_hidden"]
    whole = rounding_plan_for(inputs, needs, workspace)
    enough = 1 if is_fast else ENOUGH_ROWS
    if whole is not None and whole.rows >= min(enough, problem["tokens"]):
        return None
    plan = CandidatePlan.choose(**problem, workspace=workspace, terms=terms)
    if plan is not None and is_fast and plan.capacity < FAST_CAPACITY:
        return None
    return plan


def slabs_for(inputs: LinearInputs, tokens: int, needs: Needs, workspace: int) -> TilePlan:
    """The slabs in which the logits of some tokens are made again."""
    return TilePlan.slabs(**_problem(inputs, tokens, needs), workspace=workspace)


class _Problem(TypedDict):
    """The sizes and wishes that a plan is made from."""

    tokens: int
    hidden: int
    vocabulary: int
    models: int
    itemsize: int
    need_hidden: bool
    need_weight: bool
    on_gpu: bool
    row_bytes: int
    widened_hidden: int


def _problem(inputs: LinearInputs, tokens: int, needs: Needs) -> _Problem:
    return {
        "tokens": tokens,
        "hidden": inputs.student_hidden.shape[1],
        "vocabulary": inputs.vocabulary,
        "models": _models(inputs),
        "itemsize": inputs.student_hidden.element_size(),
        # Ready-made logits get each element of their gradient once: nothing is summed.
        "need_hidden": needs.hidden and inputs.weight is not None,
        "need_weight": needs.weight,
        "on_gpu": inputs.student_hidden.is_cuda,
        "row_bytes": _row_bytes(inputs),
        "widened_hidden": sum(
            head.shape[1]
            for head in (inputs.weight, inputs.teacher_weight)
            if head is not None and is_widened(head)
        ),
    }


def _row_bytes(inputs: LinearInputs) -> int:
    """Bytes that the products take for each token of a tile, beside the tile."""
    if inputs.weight is not None:
        widest = inputs.student_hidden
        if inputs.teacher_hidden is not None and inputs.teacher_hidden.shape[1] > widest.shape[1]:
            widest = inputs.teacher_hidden
        return copied_bytes(widest.shape[1], _models(inputs))
    # Logits of a caller are gathered, and their 16-bit gradient is rounded; 5/4 of a tile's rows
    # can wait for that (store.py).
    itemsize = inputs.student_hidden.element_size()
    gathered = 0 if inputs.tokens.is_range else itemsize
    rounded = 0 if itemsize == 4 else itemsize + itemsize // 2
    return inputs.vocabulary * max(gathered, rounded)


def _gpu_workspace(inputs: LinearInputs, needs: Needs) -> int:
    """Bytes of a tile of GPU_TOKENS, of what its products take and, with a 16-bit head that is
    trained, of its float32 dW."""
    accumulated = needs.weight and inputs.student_hidden.element_size() < 4
    columns = _models(inputs) * GPU_TOKENS + (inputs.student_hidden.shape[1] if accumulated else 0)
    problem = _problem(inputs, 1, needs)
    beside = GPU_TOKENS * problem["row_bytes"] + widened_bytes(problem["widened_hidden"])
    return 4 * inputs.vocabulary * columns + beside


def _models(inputs: LinearInputs) -> int:
    return 1 if inputs.teacher_hidden is None else 2


def _new_statistics(inputs: LinearInputs) -> Tensor:
    shape = (inputs.student_hidden.shape[0], len(Column))
    return inputs.student_hidden.new_zeros(shape, dtype=torch.float32)
