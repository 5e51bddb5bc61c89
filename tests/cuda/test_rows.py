"""The kernels of csrc/cuda, thread by thread on the host, against the CPU driver and float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from banned_entries import BANS
from row_cases import (
    DIVERGENCE,
    DIVERGENCES,
    ENTROPY,
    MIXED,
    STUDENT_LOGPROB,
    TEACHER_ENTROPY,
    TEACHER_LOGPROB,
    TRANSFORMS,
    Row,
    assert_as_good_as_torch,
    make_rows,
    visit,
)
from torch import Tensor

STEP = 2048  # columns that a block reads at a time
# Between two drivers of the same formulas: log-probs of order 10 are sums of two numbers rounded by
# 5e-7 each, of float32 sums of up to 64 exponentials that are each off by 6e-8 or a few of it.
SUMS = {"rtol": 1e-6, "atol": 2e-6}
# Of a gradient: a probability, of a logit that is off by 5e-7, times sums as above.
ENTRIES = {"rtol": 4e-6, "atol": 4e-7}


def assert_near_cpu(p: Row, found: tuple[Tensor, Tensor, Tensor]) -> None:
    """Equal to the CPU driver but for the order of float32 sums."""
    gradient, statistics, active = visit(p)
    torch.testing.assert_close(found[1], statistics, **SUMS)
    error = (found[0].double() - gradient).norm(dim=1)
    # An advantage carries the rounding of two log-probs of order 10.
    allowed = 1e-6 * gradient.norm(dim=1) + (1e-6 if p.policy_gradient else 0.0)
    assert (error <= allowed).all()
    assert torch.equal(found[2], active)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("terms", [{}, MIXED], ids=["pure", "mixed"])
def test_visit(emulated, divergence, transform, terms):
    p = make_rows(4, 2500, divergence=divergence, **transform, **terms)
    gradient, statistics, active = visit(p, ops=emulated)
    assert active.all()
    assert_as_good_as_torch(p, gradient, statistics)
    assert_near_cpu(p, (gradient, statistics, active))


@pytest.mark.parametrize("columns", [1, 3, 31, 507, STEP, STEP + 1, 3 * STEP - 2])
@pytest.mark.parametrize("divergence", [1, 2, 3])
def test_odd_vocabularies(emulated, columns, divergence):
    p = make_rows(3, columns, divergence=divergence, **MIXED)
    found = visit(p, ops=emulated)
    assert_as_good_as_torch(p, *found[:2])
    assert_near_cpu(p, found)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("spread", "closeness", "offset", "teacher_offset"),
    [(3.0, 1.0, 500.0, 0.0), (3.0, 1.0, 0.0, 300.0), (11.0, 5.0, 0.0, 0.0), (3.0, 0.01, 0.0, 0.0)],
)
def test_hard_distributions(emulated, divergence, spread, closeness, offset, teacher_offset):
    p = make_rows(
        4, 1500, spread=spread, closeness=closeness, offset=offset, teacher_offset=teacher_offset,
        divergence=divergence, cross_entropy=0.0 if divergence else 1.0,
    )  # fmt: skip
    assert_as_good_as_torch(p, *visit(p, ops=emulated)[:2])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("closeness", [1.0, 1e-2])
def test_logits_that_keep_growing(emulated, divergence, closeness):
    """Far above the first step's maxima: every thread moves its sums, more than once."""
    p = make_rows(3, 4 * STEP, spread=1.0, closeness=closeness, divergence=divergence, entropy=0.1)
    ramp = torch.linspace(0.0, 90.0, 4 * STEP)
    p = replace(p, student=p.student + ramp, teacher=p.teacher + ramp)
    assert_as_good_as_torch(p, *visit(p, ops=emulated)[:2])


@pytest.mark.parametrize("divergence", DIVERGENCES[1:])
def test_equal_models_give_exact_zero(emulated, divergence):
    p = make_rows(3, 1203, offset=500.0, divergence=divergence, policy_gradient=1.0)
    p = replace(p, teacher=p.student)
    gradient, statistics, _ = visit(p, ops=emulated)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.equal(statistics[:, DIVERGENCE], torch.zeros(3))


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 1), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("stride", [STEP + 99, STEP + 100])
def test_alignment_and_frames(emulated, shift, stride, bfloat16):
    """Rows that begin anywhere among NaNs: the same bits, and the frame stays as it was."""
    columns = STEP + 77
    p = make_rows(3, columns, bias=True, divergence=3, **MIXED)
    expected = visit(p, ops=emulated, bfloat16=bfloat16)

    def framed(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
        frame = torch.full((3, stride), math.nan)
        frame.view(-1)[by : by + 3 * stride - 8].as_strided((3, columns), (stride, 1)).copy_(x)
        return frame, frame.view(-1).as_strided((3, columns), (stride, 1), by)

    frames = [framed(p.student, shift[0]), framed(p.teacher, shift[1])]
    bias = torch.full((columns + 8,), math.nan)
    bias[shift[2] : shift[2] + columns] = p.student_bias
    statistics, active = torch.empty(3, 10), torch.ones(3, dtype=torch.bool)
    emulated.row_visit_(
        frames[0][1], frames[1][1], bias[shift[2] : shift[2] + columns], p.teacher_bias, p.targets,
        p.weight, 1.0, 0.0, 1.0, 3, p.beta, p.policy_gradient, p.cross_entropy, p.entropy, -2, 0.0,
        bfloat16, statistics, active,
    )  # fmt: skip
    for (frame, tile), result, by in zip(frames, (expected[0], p.teacher), shift, strict=False):
        if bfloat16 and tile is frames[0][1]:
            width = 2 * stride
            flat = frame.view(-1).view(torch.bfloat16)
            tile = flat.as_strided((3, columns), (width, 1), 2 * by)
            result = result.view(torch.bfloat16)[:, :columns]
        assert torch.equal(tile, result)
        outside = torch.ones(3 * stride, dtype=torch.bool)
        outside.as_strided((3, columns), (stride, 1), by).fill_(False)
        assert frame.view(-1)[outside].isnan().all()
    assert torch.equal(statistics, expected[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("place", [30, STEP + 300])
def test_bad_rows_stay_bad_and_alone(emulated, divergence, poison, place):
    p = make_rows(5, STEP + 507, divergence=divergence, cross_entropy=1.0)
    clean_gradient, clean, _ = visit(p, ops=emulated)
    p.student[1, place] = poison
    p.teacher[3, place] = poison
    gradient, statistics, active = visit(p, gate_sign=0, ops=emulated)
    good = [0, 2, 4]
    assert torch.equal(gradient[good], clean_gradient[good])
    assert torch.equal(statistics[good], clean[good])
    assert active.all()
    assert gradient[1].isnan().all()
    assert statistics[1, [STUDENT_LOGPROB, ENTROPY]].isnan().all()
    assert statistics[3, [TEACHER_LOGPROB, TEACHER_ENTROPY]].isnan().all()
    assert not statistics[3, [STUDENT_LOGPROB, ENTROPY]].isnan().any()
    if divergence:
        assert statistics[[1, 3], DIVERGENCE].isnan().all()
        assert gradient[3].isnan().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("ban", BANS)
@pytest.mark.parametrize("of_bias", [False, True])
@pytest.mark.parametrize("columns", [507, STEP + 500])
def test_entries_that_are_ruled_out(emulated, divergence, ban, of_bias, columns):
    """The whole first step of a block, and every fifth entry after it."""
    p = make_rows(
        4, columns, bias=of_bias, temperature=0.7, divergence=divergence, cross_entropy=0.2,
        entropy=0.1,
    )  # fmt: skip
    place = torch.arange(columns)
    banned = (place < columns - 450) | (place % 5 == 0)
    p = replace(p, targets=torch.arange(4) * 5 + columns - 40)
    p = replace(p, targets=p.targets + (p.targets % 5 == 0))
    models = [[p.student, p.teacher], [p.student_bias, p.teacher_bias]][of_bias]
    for name, model in zip(("student", "teacher"), models, strict=True):
        if ban in (name, "both"):
            model[..., banned] = -math.inf
    gradient, statistics, _ = visit(p, ops=emulated)
    cpu_gradient, cpu_statistics, _ = visit(p)
    rest = slice(STUDENT_LOGPROB, None)
    torch.testing.assert_close(statistics[:, rest], cpu_statistics[:, rest], rtol=2e-6, atol=1e-6)
    infinite = {("student", 1), ("teacher", 2)}
    assert statistics[:, DIVERGENCE].isinf().all() == ((ban, divergence) in infinite)
    if (ban, divergence) == ("teacher", 2):
        assert not gradient.isfinite().all(1).any()
        return
    assert (gradient - cpu_gradient).norm() <= 1e-6 * cpu_gradient.norm()

    # And from finished statistics, the sums of two slabs.
    cut = columns - 450
    state = torch.full((4, 19), math.nan, dtype=torch.float64)
    common = (p.scale, p.softcap, p.temperature, divergence)
    for part in (slice(0, cut), slice(cut, columns)):
        biases = [None if b is None else b[part] for b in (p.student_bias, p.teacher_bias)]
        emulated.row_statistics_(
            p.student[:, part], p.teacher[:, part], *biases, p.targets, *common, part.start,
            part.start == 0, state,
        )  # fmt: skip
    if divergence >= 3:
        emulated.row_mixture_(
            p.student, p.teacher, p.student_bias, p.teacher_bias, *common, p.beta, state
        )
    streamed = emulated.row_finish(state, True, True, divergence, p.beta)
    torch.testing.assert_close(streamed[:, rest], statistics[:, rest], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("columns", [100, STEP + 100])
def test_a_row_of_nothing_is_nan_and_alone(emulated, divergence, columns):
    """Less than a step: what lies beyond the row must not count either."""
    p = make_rows(5, columns, divergence=divergence, cross_entropy=1.0)
    clean_gradient, clean, _ = visit(p, ops=emulated)
    p.student[1] = -math.inf
    p.teacher[3] = -math.inf
    gradient, statistics, _ = visit(p, ops=emulated)
    good = [0, 2, 4]
    assert torch.equal(gradient[good], clean_gradient[good])
    assert torch.equal(statistics[good], clean[good])
    assert statistics[1, [STUDENT_LOGPROB, ENTROPY]].isnan().all()
    assert statistics[3, [TEACHER_LOGPROB, TEACHER_ENTROPY]].isnan().all()
    assert not statistics[3, [STUDENT_LOGPROB, ENTROPY]].isnan().any()
    assert gradient[1].isnan().all()
    if divergence:
        assert statistics[[1, 3], DIVERGENCE].isnan().all()
        assert gradient[3].isnan().all()


@pytest.mark.parametrize("sign", [-1, 0, 1])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_gate(emulated, sign, bfloat16):
    """The same rows as on the CPU; a row without a gradient stays as it was."""
    p = make_rows(12, 101)
    p.weight[5] = 0.0
    allowed = torch.arange(12) != 7
    options = {
        "gate_sign": sign, "gate_threshold": 0.4, "active": allowed, "bfloat16": bfloat16
    }  # fmt: skip
    gradient, statistics, active = visit(p, ops=emulated, **options)
    expected = visit(p, **options)
    assert torch.equal(active, expected[2])
    assert 0 < active.sum() < 12
    assert torch.equal(gradient[~active], p.student[~active])
    ungated = visit(p, ops=emulated, bfloat16=bfloat16)
    assert torch.equal(gradient[active], ungated[0][active])
    torch.testing.assert_close(statistics, expected[1], **SUMS)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_without_a_gate_rows_without_weight_become_zeros(emulated, bfloat16):
    p = make_rows(3, STEP + 9)
    p.weight[1] = 0.0
    p.student[1, 3] = math.nan
    tile, statistics, active = visit(p, ops=emulated, bfloat16=bfloat16)
    gradient = tile.view(torch.bfloat16)[:, : STEP + 9] if bfloat16 else tile
    assert active.tolist() == [True, False, True]
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
    assert gradient[[0, 2]].abs().sum(1).gt(0).all()
    left, alone, _ = visit(p, loss=False, ops=emulated)
    assert torch.equal(alone, statistics) or statistics.isnan().any()
    assert torch.equal(left.nan_to_num(), p.student.nan_to_num())  # statistics only read


def test_without_teacher_or_targets(emulated):
    p = make_rows(divergence=0, entropy=1.0)
    for options in ({"teacher": False}, {"teacher": False, "targets": False}):
        expected, found = visit(p, **options), visit(p, ops=emulated, **options)
        torch.testing.assert_close(found[1], expected[1], **SUMS)
        torch.testing.assert_close(found[0], expected[0], **ENTRIES)


def test_a_target_outside_of_the_vocabulary_shows_as_nan(emulated):
    p = make_rows()
    p.targets[2] = 507
    _, statistics, _ = visit(p, ops=emulated)
    assert statistics[:, STUDENT_LOGPROB].isnan().tolist() == [r == 2 for r in range(6)]


@pytest.mark.parametrize("columns", [3, 507, 2 * STEP + 5])
def test_bfloat16_gradient_is_the_rounded_gradient(emulated, columns):
    p = make_rows(3, columns, softcap=8.0, **MIXED)
    gradient, _, _ = visit(p, ops=emulated)
    p.student[2, 1] = math.nan
    tile, _, _ = visit(p, bfloat16=True, ops=emulated)
    narrow = tile.view(torch.bfloat16)[:, :columns]
    assert torch.equal(narrow[:2], gradient[:2].to(torch.bfloat16))
    assert narrow[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_16_bit_logits(emulated, dtype, divergence):
    """The same bits as their float32 copies; the gradient is rounded once."""
    p = make_rows(3, STEP + 13, divergence=divergence, **MIXED)
    p = replace(p, student=p.student.to(dtype), teacher=p.teacher.to(dtype))
    gradient, statistics, _ = visit(p, ops=emulated)
    wide = replace(p, student=p.student.float(), teacher=p.teacher.float())
    expected = visit(wide, ops=emulated)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected[0].to(dtype))
    assert torch.equal(statistics, expected[1])
    assert_near_cpu(wide, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("transform", [{}, TRANSFORMS[2]], ids=str)
@pytest.mark.parametrize("slab", [64, 1000, 2500])
def test_slabs_equal_one_visit(emulated, divergence, transform, slab):
    p = make_rows(4, 2500, divergence=divergence, **transform, **MIXED)
    gradient, statistics, _ = visit(p, ops=emulated)
    transform_options = (p.scale, p.softcap, p.temperature)
    pieces = [slice(i, min(i + slab, 2500)) for i in range(0, 2500, slab)]

    def cut(x: Tensor | None, piece: slice) -> Tensor | None:
        return None if x is None else x[..., piece]

    def parts(piece: slice, tile: Tensor) -> tuple[Tensor | None, ...]:
        return (
            tile[:, piece], cut(p.teacher, piece), cut(p.student_bias, piece),
            cut(p.teacher_bias, piece),
        )  # fmt: skip

    before = p.student.clone(), p.teacher.clone()
    state = torch.full((4, 19), math.nan, dtype=torch.float64)
    for piece in pieces:
        emulated.row_statistics_(
            *parts(piece, p.student), p.targets, *transform_options, divergence, piece.start,
            piece.start == 0, state,
        )  # fmt: skip
    if divergence >= 3:
        for piece in pieces:
            emulated.row_mixture_(
                *parts(piece, p.student), *transform_options, divergence, p.beta, state
            )
    streamed = emulated.row_finish(state, True, True, divergence, p.beta)
    assert torch.equal(p.student, before[0])
    assert torch.equal(p.teacher, before[1])
    torch.testing.assert_close(streamed[:, 4:], statistics[:, 4:], **SUMS)
    # A state may go from one driver to the other.
    on_cpu = torch.ops.selfdistill.row_finish(state, True, True, divergence, p.beta)
    torch.testing.assert_close(streamed, on_cpu, **SUMS)

    advantage = streamed[:, TEACHER_LOGPROB] - streamed[:, STUDENT_LOGPROB]
    token = p.weight * (p.policy_gradient * advantage + p.cross_entropy)
    weights = torch.stack([p.weight, token, p.weight * p.entropy], 1)
    weights[1, 0] = 0.0  # the divergence has no weight: its teacher is not read
    weights[3] = 0.0
    expected = p.student.clone()
    tile = p.student.clone()
    for driver, target in ((emulated, tile), (torch.ops.selfdistill, expected)):
        for piece in pieces:
            student, teacher, bias, teacher_bias = parts(piece, target)
            driver.row_gradient_(
                student, teacher if divergence else None, bias,
                teacher_bias if divergence else None, p.targets, streamed, weights,
                *transform_options, divergence, p.beta, piece.start, False,
            )  # fmt: skip
    torch.testing.assert_close(tile, expected, **ENTRIES)
    torch.testing.assert_close(tile[[0, 2]], gradient[[0, 2]], **ENTRIES)
    assert torch.equal(tile[3], torch.zeros(2500))


@pytest.mark.parametrize("rows", [1, 41, 700])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_gather_active_rows(emulated, rows, share, dtype):
    g = torch.Generator().manual_seed(0)
    for columns in (19, 16):
        tile = torch.randint(0, 99, (rows, 24), generator=g).to(dtype)[:, :columns]
        before = tile.clone()
        active = torch.rand(rows, generator=g) < share
        order = emulated.gather_active_rows_(tile, active)
        assert order.dtype == torch.int64
        assert torch.equal(order.sort().values, active.nonzero()[:, 0])
        assert torch.equal(tile[: len(order)], before[order])


@pytest.mark.parametrize("divergence", [1, 3])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_any_order_of_threads_gives_the_same_bits(emulated, monkeypatch, divergence, bfloat16):
    p = make_rows(4, 2 * STEP + 100, bias=True, divergence=divergence, **MIXED)
    active = torch.arange(300) % 3 == 0
    results = []
    for seed in (None, 1, 2, 3):
        if seed is not None:
            monkeypatch.setenv("SELFDISTILL_EMULATION_SEED", str(seed))
        tile = torch.arange(300.0)[:, None].repeat(1, 5)
        order = emulated.gather_active_rows_(tile, active)
        results.append((*visit(p, bfloat16=bfloat16, ops=emulated), tile, order))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"student": torch.zeros(6, 507, dtype=torch.float64)}, {}, "student: expected a float32"),
        ({"teacher": torch.zeros(6, 507).half()}, {}, "teacher: expected a float32"),
        ({"teacher": torch.zeros(6, 506)}, {}, "teacher: got"),
        ({"targets": torch.zeros(6, dtype=torch.int32)}, {}, "targets: expected a contiguous Long"),
        ({"temperature": 0.0}, {}, "temperature: got 0"),
        ({}, {"teacher": False}, "teacher: None"),
        ({}, {"targets": False, "gate_sign": 0}, "targets: None"),
        (
            {"student": torch.zeros(6, 507).half(), "teacher": torch.zeros(6, 507).half()},
            {"bfloat16": True},
            "gradient_in_bfloat16: True",
        ),
    ],
)
def test_errors_name_the_argument(emulated, change, options, message):
    with pytest.raises(RuntimeError, match=message):
        visit(replace(make_rows(), **change), ops=emulated, **options)
