"""Columns of the tensors that kernels hand on to each other, as constants of their code."""

from __future__ import annotations

import triton.language as tl

from selfdistill_kernels.statistics import Column

# statistics [N, STATISTICS], the values of a finished row.
STATISTICS = tl.constexpr(len(Column))
STUDENT_SHIFT = tl.constexpr(Column.STUDENT_SHIFT.value)
STUDENT_LOGSUM = tl.constexpr(Column.STUDENT_LOGSUM.value)
TEACHER_SHIFT = tl.constexpr(Column.TEACHER_SHIFT.value)
TEACHER_LOGSUM = tl.constexpr(Column.TEACHER_LOGSUM.value)
STUDENT_LOGPROB = tl.constexpr(Column.STUDENT_LOGPROB.value)
TEACHER_LOGPROB = tl.constexpr(Column.TEACHER_LOGPROB.value)
STUDENT_ENTROPY = tl.constexpr(Column.ENTROPY.value)
TEACHER_ENTROPY = tl.constexpr(Column.TEACHER_ENTROPY.value)
ROW_DIVERGENCE = tl.constexpr(Column.DIVERGENCE.value)
PIVOT = tl.constexpr(Column.PIVOT.value)

# term_weights [N, TERMS], how much each term of a token's loss counts.
TERMS = tl.constexpr(3)
DIVERGENCE_WEIGHT = tl.constexpr(0)
TOKEN_WEIGHT = tl.constexpr(1)
ENTROPY_WEIGHT = tl.constexpr(2)

# partial [pieces, STATE, capacity], what the first sweep leaves of a piece of the vocabulary.
STATE = tl.constexpr(11)
STUDENT_MAX = tl.constexpr(0)
TEACHER_MAX = tl.constexpr(1)
STUDENT_SUM = tl.constexpr(2)
TEACHER_SUM = tl.constexpr(3)
EXCESS = tl.constexpr(4)
MOMENT = tl.constexpr(5)
CURVATURE = tl.constexpr(6)
STUDENT_MOMENT = tl.constexpr(7)
TEACHER_MOMENT = tl.constexpr(8)
STUDENT_TARGET = tl.constexpr(9)
TEACHER_TARGET = tl.constexpr(10)

# partial [pieces, MIXTURE_STATE, capacity], the same of the second sweep.
MIXTURE_STATE = tl.constexpr(4)
STUDENT_MIXTURE = tl.constexpr(0)
TEACHER_MIXTURE = tl.constexpr(1)
PIVOT_SUM = tl.constexpr(2)
KAPPA_SUM = tl.constexpr(3)
# And of the clipped entries.
VALUE_SUM = tl.constexpr(0)
SLOPE_SUM = tl.constexpr(1)
CLIPPED = tl.constexpr(2)
