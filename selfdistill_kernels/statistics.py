"""Per-token statistics: what a sweep over the vocabulary leaves behind."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Column(IntEnum):
    """Columns of a finished statistics tensor [N, 10]; the order is shared with csrc/divergence.h.

    log-sum-exp = SHIFT + LOGSUM, with LOGSUM the logarithm of sum_v exp(z_v - SHIFT); the two stay
    apart so that a large common offset of the logits costs no digits (the native rows shift by the
    log-sum-exp rounded to float32, the oracle by the maximum). PIVOT is the extra row constant of
    the mixture divergences' gradients; each backend reads only its own.
    """

    STUDENT_SHIFT = 0
    STUDENT_LOGSUM = 1
    TEACHER_SHIFT = 2
    TEACHER_LOGSUM = 3
    STUDENT_LOGPROB = 4
    TEACHER_LOGPROB = 5
    ENTROPY = 6
    TEACHER_ENTROPY = 7
    DIVERGENCE = 8
    PIVOT = 9


def statistics_dtype(inputs: torch.dtype) -> torch.dtype:
    """float32 for every input dtype of training; float64 inputs keep float64 (the oracle)."""
    return torch.float64 if inputs == torch.float64 else torch.float32


def advantage_of(statistics: Tensor) -> Tensor:
    """A = log T(y) - log S(y), [N] from statistics [N, 10]."""
    return statistics[:, Column.TEACHER_LOGPROB] - statistics[:, Column.STUDENT_LOGPROB]
