"""Entries of a divergence that csrc/cuda clips, against the CPU driver and float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from row_cases import DIVERGENCE, MIXED, PIVOT, TRANSFORMS, Row, make_rows
from torch import Tensor

CLIP = 0.002
STEP = 2048  # columns that a block reads at a time
COLUMNS = STEP + 300
DIVERGENCES = [1, 2, 3, 4, 5]
# As between two drivers in test_rows.py.
SUMS = {"rtol": 1e-6, "atol": 2e-6}
ENTRIES = {"rtol": 4e-6, "atol": 4e-7}


def streamed(
    p: Row, clip: float, *, slab: int = COLUMNS, ops=torch.ops.selfdistill
) -> tuple[Tensor, Tensor]:
    """Gradient and statistics by the operators for slabs, in the order of the host loops."""
    rows, columns = p.student.shape
    tile, state = p.student.clone(), torch.full((rows, 19), math.nan, dtype=torch.float64)
    pieces = [slice(i, min(i + slab, columns)) for i in range(0, columns, slab)]
    transform = (p.scale, p.softcap, p.temperature, p.divergence)

    def operands(piece: slice) -> tuple[Tensor | None, ...]:
        biases = (None if b is None else b[piece] for b in (p.student_bias, p.teacher_bias))
        return tile[:, piece], p.teacher[:, piece], *biases

    for piece in pieces:
        ops.row_statistics_(
            *operands(piece), p.targets, *transform, piece.start, piece.start == 0, state
        )
    for piece in pieces:
        if p.divergence >= 3:
            ops.row_mixture_(*operands(piece), *transform, p.beta, state)
        if clip:
            ops.row_clip_(*operands(piece), *transform, p.beta, clip, state)
    statistics = ops.row_finish(state, True, True, p.divergence, p.beta)
    advantage = statistics[:, 5] - statistics[:, 4]
    token = p.weight * (p.policy_gradient * advantage + p.cross_entropy)
    weights = torch.stack([p.weight, token, p.weight * p.entropy], 1)
    for piece in pieces:
        ops.row_gradient_(
            *operands(piece), p.targets, statistics, weights, *transform, p.beta, piece.start,
            False, clip,
        )  # fmt: skip
    return tile, statistics


def parts(p: Row, student: Tensor, teacher: Tensor) -> Tensor:
    """f_v of raw scores without a transform."""
    log_s, log_t = student.log_softmax(1), teacher.log_softmax(1)
    log_m = torch.logaddexp(log_s + math.log1p(-p.beta), log_t + math.log(p.beta))
    of_t = log_t.exp() * (log_t - (log_s if p.divergence == 1 else log_m))
    of_s = log_s.exp() * (log_s - (log_t if p.divergence == 2 else log_m))
    return {1: of_t, 2: of_s, 3: p.beta * of_t + (1 - p.beta) * of_s, 4: of_t, 5: of_s}[
        p.divergence
    ]


def between(found: Tensor) -> float:
    """A clip that binds in the half of the rows with the largest parts, and at no row's largest."""
    return float(1.01 * found.detach().amax(1).median())


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("slab", [COLUMNS, 1000], ids=["whole", "slabs"])
def test_against_float64(emulated, divergence, slab):
    p = make_rows(6, COLUMNS, closeness=0.5, divergence=divergence)
    leaf = p.student.double().requires_grad_()
    found = parts(p, leaf, p.teacher.double())
    clip = between(found)
    exact = found.clamp(max=clip).sum(1)
    (exact_gradient,) = torch.autograd.grad((exact * p.weight).sum(), leaf)
    gradient, statistics = streamed(p, clip, slab=slab, ops=emulated)
    torch.testing.assert_close(
        statistics[:, DIVERGENCE].double(), exact.detach(), rtol=4e-6, atol=2e-6
    )
    error = (gradient.double() - exact_gradient).norm(dim=1)
    assert (error <= 4e-6 * exact_gradient.norm(dim=1) + 1e-8).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("transform", [TRANSFORMS[2], TRANSFORMS[3]], ids=str)
@pytest.mark.parametrize("columns", [3, COLUMNS])
def test_as_on_the_cpu(emulated, divergence, transform, columns):
    """Mixed losses, soft cap, temperature and bias; targets that are clipped and that are not."""
    p = make_rows(6, columns, closeness=0.7, divergence=divergence, **transform, **MIXED)
    if divergence == 2:
        p.teacher[2, p.targets[2]] -= 20.0
    else:
        p.teacher[2, p.targets[2]] += 20.0
    gradient, statistics = streamed(p, CLIP, ops=emulated)
    expected, expected_statistics = streamed(p, CLIP)
    assert (streamed(p, 0.0)[1][:, DIVERGENCE] != expected_statistics[:, DIVERGENCE]).any()
    torch.testing.assert_close(
        statistics[:, [DIVERGENCE, PIVOT]], expected_statistics[:, [DIVERGENCE, PIVOT]], **SUMS
    )
    torch.testing.assert_close(gradient, expected, **ENTRIES)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_without_a_clipped_entry_keep_their_bits(emulated, divergence):
    p = make_rows(6, 700, closeness=0.2, divergence=divergence, **MIXED)
    found = parts(p, p.student.double(), p.teacher.double())
    bound = (found > between(found)).any(1)
    assert bound.any()
    assert not bound.all()
    for clip, same in ((between(found), ~bound), (40.0, torch.ones_like(bound))):
        for plain, clipped in zip(
            streamed(p, 0.0, ops=emulated), streamed(p, clip, ops=emulated), strict=True
        ):
            assert torch.equal((plain == clipped).all(1), same)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_infinite_parts_and_what_is_no_number(emulated, divergence):
    p = make_rows(5, COLUMNS, divergence=divergence)
    clean, _ = streamed(p, CLIP, ops=emulated)
    p.student[1, 7::9] = -math.inf
    p.teacher[1, 5::9] = -math.inf
    p.student[3, 30] = math.nan
    gradient, statistics = streamed(p, CLIP, ops=emulated)
    expected, expected_statistics = streamed(p, CLIP)
    own = slice(DIVERGENCE, None)
    assert torch.equal(gradient[[0, 2, 4]], clean[[0, 2, 4]])
    assert gradient[3].isnan().all()
    assert statistics[1].isfinite().all()
    torch.testing.assert_close(gradient[1], expected[1], **ENTRIES)
    torch.testing.assert_close(statistics[1, own], expected_statistics[1, own], **SUMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits(emulated, dtype):
    """The same bits as their float32 copies; the gradient is rounded once."""
    p = make_rows(3, 700, divergence=1, **MIXED)
    p = replace(p, student=p.student.to(dtype), teacher=p.teacher.to(dtype))
    gradient, statistics = streamed(p, CLIP, ops=emulated)
    wide = replace(p, student=p.student.float(), teacher=p.teacher.float())
    expected = streamed(wide, CLIP, ops=emulated)
    assert torch.equal(gradient, expected[0].to(dtype))
    assert torch.equal(statistics, expected[1])


def test_a_visit_clips_nothing_and_says_so(emulated):
    p = make_rows(3, 100)
    statistics, active = torch.empty(3, 10), torch.ones(3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"entry_clip: got 0.1, but a visit on CUDA clips no"):
        emulated.row_visit_(
            p.student, p.teacher, None, None, p.targets, p.weight, 1.0, 0.0, 1.0, 1, 0.5, 0.0, 0.0,
            0.0, -2, 0.0, False, statistics, active, 0.1,
        )  # fmt: skip
