"""CPU backend: library GEMMs around the compiled row kernels of csrc/."""

from __future__ import annotations

import torch
from torch import Tensor

from selfdistill_kernels.backends import recompute, store
from selfdistill_kernels.backends.base import (
    Entries,
    Gate,
    Gradients,
    LinearInputs,
    Needs,
    active_tokens,
    rows_with_gradient,
    term_weights_of,
)
from selfdistill_kernels.backends.rows import RowKernels
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.plan import TilePlan
from selfdistill_kernels.statistics import Column

NO_NEEDS = Needs(False, False, False)


class NativeBackend:
    """float32 and bfloat16 inputs on the CPU."""

    def statistics(self, inputs: LinearInputs, objective: Objective, workspace: int) -> Tensor:
        statistics = _new_statistics(inputs)
        tokens = inputs.existing_rows()
        kernels = RowKernels(inputs, objective)
        plan = plan_for(inputs, tokens.numel(), NO_NEEDS, workspace)
        if plan.strategy == "recompute":
            statistics[tokens] = recompute.sweep_statistics(kernels, tokens, plan)
        else:
            store.visit(
                kernels, tokens, plan,
                gate=None, loss_weight=None, old_logprobs=None, needs=NO_NEEDS,
                statistics=statistics,
            )  # fmt: skip
        return statistics

    def top_k(self, inputs: LinearInputs, k: int, of_teacher: bool, workspace: int) -> Tensor:
        tokens = inputs.existing_rows()
        plan = TilePlan.slabs(
            tokens=tokens.numel(), vocabulary=inputs.vocabulary, heads=1, workspace=workspace
        )
        return recompute.sweep_top_k(inputs, tokens, plan, k=k, of_teacher=of_teacher)

    def visit(
        self,
        inputs: LinearInputs,
        objective: Objective,
        gate: Gate | None,
        loss_weight: Tensor,
        old_logprobs: Tensor | None,
        needs: Needs,
        workspace: int,
    ) -> tuple[Tensor, Tensor, Gradients]:
        tokens = inputs.existing_rows()
        kernels = RowKernels(inputs, objective)
        plan = plan_for(inputs, tokens.numel(), needs, workspace)
        loss_weight = loss_weight.to(torch.float32)
        statistics = _new_statistics(inputs)
        if plan.strategy == "store":
            active, gradients = store.visit(
                kernels, tokens, plan,
                gate=gate, loss_weight=loss_weight, old_logprobs=old_logprobs,
                needs=needs, statistics=statistics,
            )  # fmt: skip
            return statistics, active, gradients
        statistics[tokens] = recompute.sweep_statistics(kernels, tokens, plan)
        active = active_tokens(statistics, loss_weight, inputs.exists, gate)
        weights = term_weights_of(objective, statistics, loss_weight * active, old_logprobs)
        gradients = self.gradient(inputs, objective, statistics, weights, needs, workspace)
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
    ) -> Gradients:
        if not needs:
            return Gradients(None, None, None)
        tokens = rows_with_gradient(inputs, term_weights, entries).nonzero().squeeze(1)
        plan = TilePlan.slabs(
            tokens=tokens.numel(),
            vocabulary=inputs.vocabulary,
            heads=_heads(inputs),
            workspace=workspace,
        )
        return recompute.sweep_gradients(
            RowKernels(inputs, objective),
            tokens,
            plan,
            statistics=statistics,
            term_weights=term_weights.to(torch.float32),
            entries=entries,
            needs=needs,
        )


def plan_for(inputs: LinearInputs, tokens: int, needs: Needs, workspace: int) -> TilePlan:
    """The tiles of one visit."""
    return TilePlan.choose(
        tokens=tokens,
        hidden=inputs.student_hidden.shape[1],
        vocabulary=inputs.vocabulary,
        heads=_heads(inputs),
        itemsize=inputs.student_hidden.element_size(),
        need_weight=needs.weight,
        workspace=workspace,
    )


def _heads(inputs: LinearInputs) -> int:
    return 1 if inputs.teacher_hidden is None else 2


def _new_statistics(inputs: LinearInputs) -> Tensor:
    return torch.zeros((inputs.student_hidden.shape[0], len(Column)), dtype=torch.float32)
