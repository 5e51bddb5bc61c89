"""The streaming state of rows [n, 19] float64 (RowState of csrc/divergence.h) across ranks.

Each rank has swept its part of the vocabulary. The maxima are agreed on, every rank moves its sums
to them, and the sums are added up: 12 numbers a token cross the network, 4 more with a
mixture and 3 more with clipped entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfdistill_kernels.objective import DIVERGENCES
from selfdistill_kernels.parallel.shard import VocabularyShard

# Columns of the state.
STUDENT_MAX, TEACHER_MAX = 0, 1
SUMS = slice(2, 11)  # those of the first sweep, in the order of `_moved`, and the targets' logits
MIXTURE_SUMS = slice(11, 15)
EXPOSED = 15
CLIP_SUMS = slice(16, 19)


def join_parts(state: Tensor, divergence: int, shard: VocabularyShard) -> Tensor:
    """The state of the whole vocabulary after the first sweep, the same on every rank."""
    maxima = shard.largest(state[:, [STUDENT_MAX, TEACHER_MAX, EXPOSED]])
    joined = torch.zeros_like(state)
    joined[:, STUDENT_MAX], joined[:, TEACHER_MAX], joined[:, EXPOSED] = maxima.unbind(dim=1)
    joined[:, SUMS] = shard.total(_moved(state, maxima[:, 0], maxima[:, 1], divergence))
    return joined


def add_second_sums(state: Tensor, shard: VocabularyShard, *, mixture: bool, clips: bool) -> None:
    """Add up what the second sweep left on each rank, of a mixture and of clipped entries."""
    for columns, is_there in ((MIXTURE_SUMS, mixture), (CLIP_SUMS, clips)):
        if is_there:
            state[:, columns] = shard.total(state[:, columns])


def _moved(state: Tensor, student_max: Tensor, teacher_max: Tensor, divergence: int) -> Tensor:
    """[n, 9] the sums around other maxima: `move_maxima` of csrc/divergence.h."""
    (
        student_sum, teacher_sum, excess, moment, curvature, student_moment, teacher_moment,
        *targets,
    ) = state[:, SUMS].unbind(dim=1)  # fmt: skip
    by_s, by_t = state[:, STUDENT_MAX] - student_max, state[:, TEACHER_MAX] - teacher_max
    a_s, a_t, c = by_s.exp(), by_t.exp(), by_t - by_s
    is_near = c.abs() < 0.5
    grow = torch.where(is_near, a_s * torch.expm1(c), a_t - a_s)
    if divergence == DIVERGENCES["forward_kl"]:
        lift = torch.where(is_near, a_t * (c + torch.expm1(-c)), a_t * c - grow)
        curvature = a_t * (curvature + c * excess) + student_sum * lift
        moment = a_t * (moment + c * teacher_sum)
    elif divergence == DIVERGENCES["reverse_kl"]:
        lift = torch.where(is_near, a_s * (torch.expm1(c) - c), grow - a_s * c)
        curvature = a_s * curvature + excess * grow + student_sum * lift
        moment = a_s * (moment + c * student_sum)
    return torch.stack(
        [
            student_sum * a_s,
            teacher_sum * a_t,
            a_t * excess + student_sum * grow,
            moment,
            curvature,
            a_s * (student_moment + by_s * student_sum),
            a_t * (teacher_moment + by_t * teacher_sum),
            *targets,
        ],
        dim=1,
    )
