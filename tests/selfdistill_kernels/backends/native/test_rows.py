"""The operators of csrc/: rows against float64 autograd, on every instruction set; products."""

from __future__ import annotations

import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from exactness import assert_no_worse_than_torch
from processors import NEEDS_BFLOAT16, needs
from row_cases import (
    DIVERGENCE,
    DIVERGENCES,
    ENTROPY,
    MIXED,
    STUDENT_LOGPROB,
    STUDENT_LOGSUM,
    STUDENT_SHIFT,
    TEACHER_ENTROPY,
    TEACHER_LOGPROB,
    TEACHER_SHIFT,
    TRANSFORMS,
    assert_as_good_as_torch,
    make_rows,
    oracle,
    visit,
)
from torch import Tensor

pytest.importorskip("selfdistill_kernels._C", reason="native rows not built: pip install -e .")
ops = torch.ops.selfdistill

CAPABILITIES = ["avx512", "avx2", "default"]
NEEDS_TEACHER = [1, 2, 3, 4, 5]


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    best = ops.cpu_capability()
    try:
        ops.set_cpu_capability(request.param)
    except RuntimeError:
        pytest.skip(needs(request.param))
    yield request.param
    ops.set_cpu_capability(best)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("terms", [{}, MIXED], ids=["pure", "mixed"])
def test_visit_against_float64(capability, divergence, transform, terms):
    p = make_rows(divergence=divergence, **transform, **terms)
    gradient, statistics, active = visit(p)
    assert active.all()
    assert_as_good_as_torch(p, gradient, statistics)


@pytest.mark.parametrize("columns", [1, 3, 17, 1023, 50257])
@pytest.mark.parametrize("divergence", [1, 3])
def test_odd_vocabularies(capability, columns, divergence):
    p = make_rows(3, columns, divergence=divergence, **MIXED)
    gradient, statistics, _ = visit(p)
    assert_as_good_as_torch(p, gradient, statistics)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("spread", "closeness", "offset", "teacher_offset"),
    [
        (3.0, 1.0, 500.0, 0.0),  # a common offset
        (3.0, 1.0, 0.0, 300.0),  # one model's own
        (11.0, 5.0, 0.0, 0.0),  # peaked
        (4.0, 30.0, 0.0, 0.0),  # hardly any common support
        (3.0, 0.01, 0.0, 0.0),  # close
    ],
)
def test_hard_distributions(capability, divergence, spread, closeness, offset, teacher_offset):
    for seed in range(5):
        p = make_rows(
            8, 1500, spread=spread, closeness=closeness, offset=offset,
            teacher_offset=teacher_offset, divergence=divergence, seed=seed,
            cross_entropy=0.0 if divergence else 1.0,
        )  # fmt: skip
        gradient, statistics, _ = visit(p)
        assert_as_good_as_torch(p, gradient, statistics)


@pytest.mark.parametrize("divergence", NEEDS_TEACHER)
@pytest.mark.parametrize("closeness", [1e-2, 1e-4])
def test_digits_of_nearly_equal_distributions(capability, divergence, closeness):
    """Five digits of a divergence of order 1e-9, of which plain float32 has none."""
    p = make_rows(4, 3000, closeness=closeness, divergence=divergence)
    gradient, statistics, _ = visit(p)
    exact_gradient, exact = oracle(p, torch.float64)
    # Plain float32 has nothing to compare with. Ours is a sum of positive terms, each rounded a
    # few times by 6e-8, which is five digits with room for other instructions. float64 autograd
    # itself loses digits here: KL ~ closeness^2 out of terms of order closeness.
    tolerance = 1e-5 if closeness > 1e-3 else 1e-4
    torch.testing.assert_close(
        statistics[:, DIVERGENCE].double(), exact[:, 4], rtol=tolerance, atol=0
    )
    error = (gradient.double() - exact_gradient).norm() / exact_gradient.norm()
    assert error < 1e-5


@pytest.mark.parametrize("divergence", NEEDS_TEACHER)
def test_peaked_and_nearly_equal_distributions(capability, divergence):
    """First-order terms cancel where nearly all of the mass is on one entry: what their roundings
    leave of a pivot must not be read as another one."""
    p = make_rows(2000, 50, spread=8.0, closeness=1e-3, divergence=divergence, beta=0.3)
    gradient, _, _ = visit(p)
    exact, _ = oracle(p, torch.float64)
    assert (gradient - exact).norm(dim=1).max() <= 1e-5


@pytest.mark.parametrize("divergence", NEEDS_TEACHER)
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_equal_models_give_exact_zero(capability, divergence, offset):
    p = make_rows(5, 1203, offset=offset, divergence=divergence, policy_gradient=1.0)
    p = replace(p, teacher=p.student)
    gradient, statistics, _ = visit(p)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert torch.equal(statistics[:, DIVERGENCE], torch.zeros(5))
    assert torch.equal(statistics[:, STUDENT_LOGPROB], statistics[:, TEACHER_LOGPROB])


def test_normaliser_columns_hold_the_log_sum_exp(capability):
    p = make_rows(offset=500.0)
    _, statistics, _ = visit(p)
    for raw, shift in ((p.student, STUDENT_SHIFT), (p.teacher, TEACHER_SHIFT)):
        pair = statistics[:, shift].double() + statistics[:, shift + 1].double()
        # The second number is small and carries the error of float32 sums of 64 terms, a few times
        # 6e-8; one float32 near 500 would be off by up to 1.5e-5.
        assert (pair - raw.double().logsumexp(-1)).abs().max() < 2e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("transform", [{}, TRANSFORMS[2]], ids=str)
@pytest.mark.parametrize("slab", [1, 64, 1000, 2500])
def test_slabs_equal_one_visit(capability, divergence, transform, slab):
    p = make_rows(4, 2500, divergence=divergence, **transform, **MIXED)
    _, statistics, _ = visit(p)
    transform_options = (p.scale, p.softcap, p.temperature)
    columns = p.student.shape[1]
    pieces = [slice(i, min(i + slab, columns)) for i in range(0, columns, slab)]

    def cut(x: Tensor | None, piece: slice) -> Tensor | None:
        return None if x is None else x[..., piece]

    before = p.student.clone(), p.teacher.clone()
    state = torch.full((4, 19), math.nan, dtype=torch.float64)
    for piece in pieces:
        ops.row_statistics_(
            cut(p.student, piece), cut(p.teacher, piece), cut(p.student_bias, piece),
            cut(p.teacher_bias, piece), p.targets, *transform_options, divergence, piece.start,
            piece.start == 0, state,
        )  # fmt: skip
    if divergence >= 3:
        for piece in pieces:
            ops.row_mixture_(
                cut(p.student, piece), cut(p.teacher, piece), cut(p.student_bias, piece),
                cut(p.teacher_bias, piece), *transform_options, divergence, p.beta, state,
            )  # fmt: skip
    streamed = ops.row_finish(state, True, True, divergence, p.beta)
    assert torch.equal(p.student, before[0])
    assert torch.equal(p.teacher, before[1])
    # The pair of a normaliser is one number.
    for shift in (STUDENT_SHIFT, TEACHER_SHIFT):
        a, b = (x[:, shift].double() + x[:, shift + 1] for x in (streamed, statistics))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # float32 sums of 64: a few times 6e-8
    # Differences of log-probs of order 10, rounded by 5e-7, and not more of them than two.
    rest = slice(STUDENT_LOGPROB, None)
    torch.testing.assert_close(streamed[:, rest], statistics[:, rest], rtol=2e-6, atol=1e-6)

    advantage = streamed[:, TEACHER_LOGPROB] - streamed[:, STUDENT_LOGPROB]
    weights = torch.stack(
        [
            p.weight,
            p.weight * (p.policy_gradient * advantage + p.cross_entropy),
            p.weight * p.entropy,
        ],
        1,
    )
    tile = p.student.clone()
    for piece in pieces:
        ops.row_gradient_(
            tile[:, piece], cut(p.teacher, piece) if divergence else None,
            cut(p.student_bias, piece), cut(p.teacher_bias, piece) if divergence else None,
            p.targets, streamed, weights, *transform_options, divergence, p.beta, piece.start,
            False,
        )  # fmt: skip
    assert_as_good_as_torch(p, tile, streamed)


def test_statistics_without_teacher_or_targets(capability):
    p = make_rows(divergence=0)
    _, both, _ = visit(p, loss=False)
    left, alone, _ = visit(p, teacher=False, targets=False, loss=False)
    kept = [STUDENT_SHIFT, STUDENT_LOGSUM, ENTROPY]
    assert torch.equal(alone[:, kept], both[:, kept])
    others = [i for i in range(10) if i not in kept]
    assert torch.equal(alone[:, others], torch.zeros(6, len(others)))
    assert torch.equal(left, p.student)


def test_transform_leaves_logits_in_rows_without_a_gradient(capability):
    p = make_rows(bias=True, scale=1.3, softcap=8.0, temperature=0.7)
    logits, _, _ = visit(p, loss=False)
    raw = p.student + p.student_bias
    torchs, exact = (
        p.softcap * torch.tanh(p.scale * x / p.softcap) / p.temperature for x in (raw, raw.double())
    )
    assert_no_worse_than_torch("logits", logits, torchs, exact)


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize(
    ("sign", "passes"),
    [
        (-2, lambda a, threshold: torch.ones_like(a, dtype=torch.bool)),
        (0, lambda a, threshold: a.abs() > threshold),
        (1, lambda a, threshold: a > threshold),
        (-1, lambda a, threshold: a < -threshold),
    ],
)
def test_gate(capability, sign, passes, threshold):
    p = make_rows(40, 101)
    p = replace(p, teacher=torch.cat([p.student[:4], p.teacher[4:]]))  # four advantages of 0
    p.weight[5] = 0.0
    allowed = torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.8
    gradient, statistics, active = visit(
        p, gate_sign=sign, gate_threshold=threshold, active=allowed
    )
    advantage = statistics[:, TEACHER_LOGPROB] - statistics[:, STUDENT_LOGPROB]
    wanted = allowed & (p.weight != 0) & passes(advantage, threshold)
    assert 0 < wanted.sum() < 40
    assert torch.equal(active, wanted)
    ungated, all_statistics, _ = visit(p)
    assert torch.equal(gradient[active], ungated[active])
    assert torch.equal(statistics, all_statistics)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_bad_rows_stay_bad_and_alone(capability, divergence, poison):
    p = make_rows(5, 507, divergence=divergence, cross_entropy=1.0)
    clean_gradient, clean, _ = visit(p)
    p.student[1, 300] = poison
    p.teacher[3, 2] = poison
    gradient, statistics, active = visit(p, gate_sign=0)
    good = [0, 2, 4]
    assert torch.equal(gradient[good], clean_gradient[good])
    assert torch.equal(statistics[good], clean[good])
    assert active.all()  # a NaN advantage is seen, not hidden
    assert gradient[1].isnan().all()
    assert statistics[1, [STUDENT_LOGPROB, ENTROPY]].isnan().all()
    assert statistics[3, [TEACHER_LOGPROB, TEACHER_ENTROPY]].isnan().all()
    assert not statistics[3, [STUDENT_LOGPROB, ENTROPY]].isnan().any()
    if divergence:
        assert statistics[[1, 3], DIVERGENCE].isnan().all()
        assert gradient[3].isnan().all()


@pytest.mark.parametrize("columns", [3, 507, 4096])
def test_bfloat16_gradient_is_the_rounded_gradient(capability, columns):
    p = make_rows(5, columns, softcap=8.0, **MIXED)
    gradient, _, _ = visit(p)
    tile, _, _ = visit(p, bfloat16=True)
    narrow = tile.view(torch.bfloat16)[:, :columns]
    assert torch.equal(narrow, gradient.to(torch.bfloat16))
    p.student[2, 1] = math.nan
    tile, _, _ = visit(p, bfloat16=True)
    assert tile.view(torch.bfloat16)[2, :columns].isnan().all()


def test_rows_with_a_stride(capability):
    p = make_rows(5, 333, divergence=3, **MIXED)
    gradient, statistics, _ = visit(p)
    wide = torch.full((5, 400), 7.0)
    wide[:, :333] = p.student
    found = torch.empty(5, 10)
    ops.row_visit_(
        wide[:, :333], p.teacher.clone(), None, None, p.targets, p.weight, 1.0, 0.0, 1.0, 3, p.beta,
        p.policy_gradient, p.cross_entropy, p.entropy, -2, 0.0, False, found,
        torch.ones(5, dtype=torch.bool),
    )  # fmt: skip
    assert torch.equal(wide[:, :333], gradient)
    assert torch.equal(wide[:, 333:], torch.full((5, 67), 7.0))
    assert torch.equal(found, statistics)


def test_rows_without_weight_have_zero_gradient(capability):
    p = make_rows(3, 50)
    p.student[1, 4] = math.nan
    _, statistics, _ = visit(p, loss=False)
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    tile = p.student.clone()
    ops.row_gradient_(
        tile, p.teacher, None, None, p.targets, statistics, weights, 1.0, 0.0, 1.0, 1, 0.5, 0, False
    )
    assert torch.equal(tile[1], torch.zeros(50))
    assert tile[[0, 2]].abs().sum(1).gt(0).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("narrow", [False, True])
def test_gather_active_rows(share, narrow):
    g = torch.Generator().manual_seed(0)
    whole = torch.randint(-9, 9, (41, 24), generator=g).float()
    tile = (whole.view(torch.bfloat16) if narrow else whole)[:, :19]
    before = tile.clone()
    active = torch.rand(41, generator=g) < share
    order = ops.gather_active_rows_(tile, active)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, active.nonzero()[:, 0])
    assert torch.equal(tile[: len(order)], before[order])


def test_same_bits_for_any_number_of_threads():
    p = make_rows(33, 1000, divergence=3, **MIXED)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(visit(p))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def make_products(
    rows: int, hidden: int, columns: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [R, H], weight [V, H] and gradient [R, V] (among NaNs, as in a visited tile)."""
    g = torch.Generator().manual_seed(seed)
    h, w, dz = (
        torch.randn(*shape, generator=g).to(torch.bfloat16)
        for shape in ((rows, hidden), (columns, hidden), (rows, columns))
    )
    tile = torch.full((rows, 2 * columns), math.nan, dtype=torch.bfloat16)
    tile[:, :columns] = dz
    return h, w, tile[:, :columns]


needs_bfloat16 = pytest.mark.skipif(not ops.gemm_bf16_available(), reason=NEEDS_BFLOAT16)


@needs_bfloat16
@pytest.mark.parametrize("rows", [1, 3, 33, 130])
@pytest.mark.parametrize("hidden", [1, 2, 31, 65, 576])
@pytest.mark.parametrize("columns", [1, 17, 64, 507, 1025])
def test_bfloat16_products(rows, hidden, columns):
    """float32 results: closer to float64 than bfloat16 could hold, also with odd shapes."""
    h, w, dz = make_products(rows, hidden, columns)
    frame = torch.full((rows, columns + 3), 7.0)
    logits = frame[:, :columns]
    ops.gemm_bf16_logits_(h, w, logits)
    h64, w64, dz64 = h.double(), w.double(), dz.double()
    assert_near(logits, h64 @ w64.T, hidden)
    assert torch.equal(frame[:, columns:], torch.full((rows, 3), 7.0))
    dh64, dw64 = dz64 @ w64, dz64.T @ h64
    dh = torch.full(dh64.shape, math.nan)
    ops.gemm_bf16_hidden_gradient_(dz, w, False, dh)
    assert_near(dh, dh64, columns)
    before = torch.randn(dh64.shape)
    dh.copy_(before)
    ops.gemm_bf16_hidden_gradient_(dz, w, True, dh)
    assert_near(dh, dh64 + before, columns)

    dw = torch.full(dw64.shape, math.nan)
    ops.gemm_bf16_weight_gradient_(dz, h, None, dw)
    assert_near(dw, dw64, rows)
    before = torch.randn(dw64.shape)
    added = dw.fill_(math.nan)
    ops.gemm_bf16_weight_gradient_(dz, h, before, added)
    assert_near(added, dw64 + before, rows)
    in_place = before.clone()
    ops.gemm_bf16_weight_gradient_(dz, h, in_place, in_place)
    assert torch.equal(in_place, added)
    rounded = torch.full(dw64.shape, math.nan, dtype=torch.bfloat16)
    ops.gemm_bf16_weight_gradient_(dz, h, before, rounded)
    assert torch.equal(rounded, added.bfloat16())  # rounded once


def assert_near(ours: Tensor, exact: Tensor, depth: int) -> None:
    """Within the rounding of a float32 sum of `depth` products of order 1.

    Not plain torch's error: a float32 product sums in many registers at once, these tiles one after
    the other. Of `depth` additions each rounds by 6e-8 of a partial sum, which is of order
    sqrt(depth), as is the largest result; they add up as a random walk, to 6e-8 times `depth` or
    less. The bound, about 1.3e-6 depth^0.75, lies above that for every depth here, and a thousand
    times below what a result rounded to bfloat16 would be off by.
    """
    error = (ours.double() - exact).abs().max()
    assert error <= 6e-7 * max(depth, 16) ** 0.5 * max(1.0, float(exact.abs().max())) ** 0.5


@needs_bfloat16
def test_bfloat16_products_do_not_depend_on_the_threads():
    h, w, dz = make_products(70, 200, 1500)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5, 9):
            torch.set_num_threads(count)
            out = torch.empty(70, 1500), torch.empty(70, 200), torch.empty(1500, 200)
            ops.gemm_bf16_logits_(h, w, out[0])
            ops.gemm_bf16_hidden_gradient_(dz, w, False, out[1])
            ops.gemm_bf16_weight_gradient_(dz, h, None, out[2])
            results.append(out)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_bfloat16
def test_bfloat16_products_of_nothing():
    h, w, dz = make_products(0, 8, 5)
    out = torch.full((5, 8), 3.0)
    ops.gemm_bf16_weight_gradient_(dz, h, out, out)
    assert torch.equal(out, torch.full((5, 8), 3.0))
    ops.gemm_bf16_weight_gradient_(dz, h, None, out)
    assert torch.equal(out, torch.zeros(5, 8))
    ops.gemm_bf16_logits_(h, w, torch.empty(0, 5))
    ops.gemm_bf16_hidden_gradient_(dz, w, False, torch.empty(0, 8))


@pytest.mark.parametrize(
    ("operands", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(3, 4).bfloat16()), "hidden: expected a BFloat16"),
        ((torch.zeros(2, 4).bfloat16(), torch.zeros(3, 5).bfloat16()), "weight: expected"),
        ((torch.zeros(2, 4).bfloat16(), torch.zeros(4, 3).bfloat16().T), "weight: expected"),
    ],
)
def test_errors_of_products(operands, message):
    with pytest.raises(RuntimeError, match=message):
        ops.gemm_bf16_logits_(*operands, torch.empty(2, 3))


def _visit_in_child(queue: multiprocessing.Queue) -> None:
    # As DataLoader workers do: with more threads any torch operator hangs in a forked child,
    # because libgomp's threads do not survive a fork.
    torch.set_num_threads(1)
    queue.put(visit(make_rows(8, 600))[0].sum().item())


def test_works_in_a_forked_process():
    expected = visit(make_rows(8, 600))[0].sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_visit_in_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.kill()
        child.join()


def test_capability_from_the_environment():
    code = (
        "import torch, selfdistill_kernels._C\n"
        "print(torch.ops.selfdistill.cpu_capability(), end='')"
    )

    def run(value: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "SELFDISTILL_CPU_CAPABILITY": value},
            capture_output=True,
            text=True,
            check=False,
        )

    assert run("default").stdout == "default"
    assert "expected 'default'" in run("sse9").stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(6, 507, dtype=torch.float64)}, "student: expected a float32"),
        ({"student": torch.zeros(507, 6).T}, "student: expected a float32"),
        ({"teacher": torch.zeros(6, 506)}, "teacher: got"),
        ({"targets": torch.zeros(6, dtype=torch.int32)}, "targets: expected a contiguous Long"),
        ({"targets": torch.full((6,), 507)}, "targets: got 507"),
        ({"weight": torch.ones(5)}, "loss_weight: expected"),
        ({"student_bias": torch.zeros(6)}, "student_bias: expected"),
        ({"temperature": 0.0}, "temperature: got 0"),
        ({"softcap": -1.0}, "softcap: got -1"),
        ({"divergence": 6}, "divergence: got 6"),
        ({"divergence": 3, "beta": 1.0}, "beta: got 1"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(RuntimeError, match=message):
        visit(replace(make_rows(), **change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": False}, "teacher: None"),
        ({"targets": False, "gate_sign": 0}, "targets: None"),
        ({"gate_sign": 3}, "gate_sign: got 3"),
        ({"active": torch.ones(5, dtype=torch.bool)}, "active: expected"),
    ],
)
def test_errors_of_missing_inputs(options, message):
    with pytest.raises(RuntimeError, match=message):
        visit(make_rows(), **options)
