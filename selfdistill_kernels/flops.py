"""Tells torch.utils.flop_counter what the operators multiply, when it is imported:

    import selfdistill_kernels.flops

Without it a counter sees nothing of the losses from hidden states. The package does not do it by
itself, because torch's counter imports Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from selfdistill_kernels import ops  # noqa: F401  the operators must exist to be counted

Shape = tuple[int, ...]


def _scores(hidden: Shape | None, weight: Shape) -> int:
    """One product of hidden states [N, H] with a head [V, H]."""
    return 0 if hidden is None else 2 * hidden[0] * hidden[1] * weight[0]


def _products(
    student: Shape, teacher: Shape | None, weight: Shape | None, teacher_weight: Shape | None,
    gradients: tuple[bool, bool],
) -> int:  # fmt: skip
    """The products of a visit, of all tokens, masked or not; those of logits are somebody else's.

    What a plan computes a second time to save memory does not count.
    """
    if weight is None:
        return 0
    head = weight if teacher_weight is None else teacher_weight
    return _scores(student, weight) * (1 + sum(gradients)) + _scores(teacher, head)


# The second makes the scores of both models again, then the gradients that are needed.
@register_flop_formula(
    [torch.ops.selfdistill.linear_loss, torch.ops.selfdistill.linear_statistics_backward]
)
def linear_loss_flop(
    student: Shape, teacher: Shape | None, weight: Shape | None, teacher_weight: Shape | None,
    *options: Any, **_: Any,
) -> int:  # fmt: skip
    """2 N H V for the scores of either model, and for each gradient that is needed."""
    need_hidden, need_weight, *_rest = options[-5:]
    return _products(student, teacher, weight, teacher_weight, (need_hidden, need_weight))


@register_flop_formula(torch.ops.selfdistill.linear_statistics)
def linear_statistics_flop(
    student: Shape, teacher: Shape | None, weight: Shape | None, teacher_weight: Shape | None,
    *_options: Any, **_: Any,
) -> int:  # fmt: skip
    """2 N H V for the scores of either model."""
    return _products(student, teacher, weight, teacher_weight, (False, False))
