"""Library GEMMs around the compiled row kernels of csrc/, on the CPU or on a GPU.

On a GPU one visit waits for the device where it must know a number of rows: once for the tokens
that exist, once a tile with an advantage mask, once a call in a backward pass that recomputes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

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
# Tokens of a tile on a GPU: its GEMMs read the head, and add to dW, seldom enough (docs/math.md).
GPU_TOKENS = 2048

P = ParamSpec("P")
Result = TypeVar("Result")


def _beside_inputs(
    method: Callable[Concatenate[NativeBackend, LinearInputs, P], Result],
) -> Callable[Concatenate[NativeBackend, LinearInputs, P], Result]:
    """Tensors that a host loop makes lie on the device of its inputs."""

    @functools.wraps(method)
    def wrapped(
        self: NativeBackend, inputs: LinearInputs, /, *args: P.args, **kwargs: P.kwargs
    ) -> Result:
        device = inputs.student_hidden.device
        if device == torch.get_default_device():
            return method(self, inputs, *args, **kwargs)
        with torch.device(device):
            return method(self, inputs, *args, **kwargs)

    return wrapped


class NativeBackend:
    """float32 and bfloat16 inputs; on a GPU float16 too."""

    @_beside_inputs
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

    @_beside_inputs
    def top_k(self, inputs: LinearInputs, k: int, of_teacher: bool, workspace: int) -> Tensor:
        return recompute.sweep_top_k(inputs, k, of_teacher, workspace)

    @_beside_inputs
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

    @_beside_inputs
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
    if workspace == 0 and inputs.student_hidden.is_cuda:
        workspace = _gpu_workspace(inputs, needs)
    return TilePlan.choose(
        tokens=tokens,
        hidden=inputs.student_hidden.shape[1],
        vocabulary=inputs.vocabulary,
        heads=_heads(inputs),
        itemsize=inputs.student_hidden.element_size(),
        need_weight=needs.weight,
        workspace=workspace,
    )


def _gpu_workspace(inputs: LinearInputs, needs: Needs) -> int:
    """Bytes of a tile of GPU_TOKENS and, with a 16-bit head that is trained, of its float32 dW."""
    accumulated = needs.weight and inputs.student_hidden.element_size() < 4
    columns = _heads(inputs) * GPU_TOKENS + (inputs.student_hidden.shape[1] if accumulated else 0)
    return 4 * inputs.vocabulary * columns


def _heads(inputs: LinearInputs) -> int:
    return 1 if inputs.teacher_hidden is None else 2


def _new_statistics(inputs: LinearInputs) -> Tensor:
    return torch.zeros((inputs.student_hidden.shape[0], len(Column)), dtype=torch.float32)
