"""The heads of student and teacher, found by the kernels' `head_of`."""

from __future__ import annotations

import torch

from selfdistill.errors import UserError
from selfdistill.model.teacher import Teacher
from selfdistill_kernels import integrations
from selfdistill_kernels.integrations import Head as LMHead
from selfdistill_kernels.integrations import head_of

__all__ = ["LMHead", "UnsupportedHeadError", "find_lm_head", "find_lm_heads"]


class UnsupportedHeadError(UserError):
    """The model makes its logits in a way that the fused loss does not know."""


def find_lm_head(model: torch.nn.Module) -> LMHead:
    """Find a model's head and make sure that it is all there is between hidden states and logits.

    Raises:
        UnsupportedHeadError: the model's own logits differ from what the head gives, or the head is
            quantised.
    """
    try:
        return head_of(model)
    except integrations.UnsupportedHeadError as error:
        raise UnsupportedHeadError(str(error)) from error


def find_lm_heads(student: torch.nn.Module, teacher: Teacher | None) -> tuple[LMHead, LMHead]:
    """Return the heads of the student and of its teacher; without a teacher twice the student's.

    The weights of both change in place as training goes on.
    """
    own = find_lm_head(student)
    if teacher is None:
        return own, own
    with teacher.weights(student) as teacher_model:
        return own, find_lm_head(teacher_model)
