"""The cost model: hand-computed cases, limits, and the bound on the sweep's traffic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import cost
from benchmarks.cost import GPUS, Cost, Gpu, Size, Step
from selfdistill_kernels.backends.triton.plan import Configuration, Machine

# 1e12 flop/s and 1e9 bytes/s at full use; a usable cache of 48 KiB; 4 processors with tiles of
# 16 x 32.
TOY = Gpu(
    "toy", 1e12, 1e9, Machine("toy", 4, 49152, descriptors=False),
    Configuration(16, 32, 32, 1, 4, 2), 1.0, 0.5, 1.0, "no data sheet",
)  # fmt: skip
SMALL = Size(tokens=100, hidden=256, vocabulary=1000)
# The plan keeps room in the cache for head tiles in flight; here that costs whole groups of rows,
# so that the head is read more often than the least.
MORE_GROUPS = {("A100", (8192, 4096, 128256)): 1.15, ("MI300X", (8192, 4096, 128256)): 1.92}
SHAPES = [(8192, 4096, 128256), (8192, 2048, 151936), (4096, 1024, 151936)]


def by_name(made: Cost) -> dict[str, Step]:
    return {step.name: step for step in made.steps}


# With kernels that specialise their warps and reach 0.8 of the peak.
SPECIALISED = replace(TOY, specialised=0.8)


def test_a_step_takes_the_longer_of_arithmetic_and_traffic():
    launch = cost.LAUNCH_SECONDS
    assert Step("", "library", 2e12, 1e9).seconds(TOY) == pytest.approx(2.0 + launch)
    assert Step("", "library", 2e12, 3e9).seconds(TOY) == pytest.approx(3.0 + launch)
    # Half of the peak for fused kernels.
    assert Step("", "fused", 2e12, 3e9).seconds(TOY) == pytest.approx(4.0 + launch)
    assert Step("", "rows", 0.0, 1e9, 1000).seconds(TOY) == pytest.approx(1.0 + 1000 * launch)


def test_specialised_kernels_where_somebody_has_them():
    step = Step("", "specialised", 2e12, 1e9)
    assert step.seconds(SPECIALISED) == pytest.approx(2.5 + cost.LAUNCH_SECONDS)
    with pytest.raises(ValueError, match="toy: no figure of a warp-specialised kernel"):
        step.seconds(TOY)
    known = {name for name, gpu in GPUS.items() if gpu.specialised is not None}
    assert known == {"H100", "H200", "B200"}


def test_units_of_a_size():
    assert SMALL.gemm == 2 * 100 * 256 * 1000
    assert SMALL.head_bytes == 512_000
    assert SMALL.hidden_bytes == 51_200
    assert SMALL.active(0.05) == 5
    with pytest.raises(ValueError, match=r"rho: expected a share in \[0, 1\], got 1.5"):
        SMALL.active(1.5)


def test_the_sweep_by_hand():
    """Two blocks of 16 rows of two models (1,024 bytes a row) fit 48 KiB beside a quarter of two
    head tiles (16 KiB each), three do not: 4 groups of 32 rows."""
    assert cost.group_rows(SMALL, TOY) == 32
    assert cost.pieces(SMALL, TOY) == 1  # 32 tiles of 32 columns, up to 128 a piece
    sweep = cost.sweep(SMALL, TOY)
    assert sweep.flops == 2 * SMALL.gemm
    assert sweep.bytes == 4 * 512_000 + 2 * 51_200 + 2 * 44 * 100 * 1 + 40 * 100
    # 48 rows would fill the cache.
    assert cost.least_sweep_bytes(SMALL, TOY) == 3 * 512_000 + 2 * 51_200
    # A student alone: rows of half the size, half the flops, and half the head reads.
    alone = cost.sweep(replace(SMALL, models=1), TOY)
    assert alone.flops == SMALL.gemm
    assert alone.bytes == 2 * 512_000 + 51_200 + 2 * 44 * 100 + 4000


def test_a_piece_is_narrow_where_there_is_little_work():
    few = Size(tokens=16, hidden=256, vocabulary=8192)
    assert cost.pieces(few, TOY) == 4  # one row block: a piece for each processor
    assert cost.pieces(replace(few, tokens=1600), TOY) == 2  # pieces of 4,096 columns


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rho", [0.0, 0.05, 0.5, 1.0])
def test_gemms_of_each_strategy(rho, trained):
    """docs/math.md: 2 + 4 rho and 2 + 2 rho GEMMs, a frozen head saves rho of them."""
    fused = cost.sweep_and_gradient(SMALL, TOY, rho=rho, trained=trained)
    stored = cost.store(SMALL, TOY, rho=rho, trained=trained)
    assert fused.flops == pytest.approx((2 + (4 if trained else 3) * rho) * SMALL.gemm)
    assert stored.flops == pytest.approx((2 + (2 if trained else 1) * rho) * SMALL.gemm)
    assert cost.floor(SMALL, trained=trained).flops == (3 + trained) * SMALL.gemm
    tiles = cost.tiles(SMALL, rows=40, columns=300, trained=trained)
    assert tiles.flops == (5 + trained) * SMALL.gemm
    assert cost.materialised(SMALL, "jsd", trained=trained).flops == (3 + trained) * SMALL.gemm


def test_the_gradient_by_hand(monkeypatch):
    """50 active rows (two groups of 32), slabs of 400 columns (three of them)."""
    monkeypatch.setattr(cost, "SLAB_COLUMNS", 400)
    made = by_name(cost.sweep_and_gradient(SMALL, TOY, rho=0.5))
    dz, rows = 50 * 1000 * 2, 50 * 256 * 2
    assert made["gradient tiles"].flops == 2 * 2 * 50 * 256 * 1000
    assert made["gradient tiles"].bytes == 2 * 512_000 + 3 * 2 * rows + dz
    assert made["gradient tiles"].launches == 3
    assert made["dH"].bytes == dz + 512_000 + 3 * 2 * 4 * 50 * 256
    assert made["dW"].bytes == dz + 3 * rows + 512_000
    # Behind a mask only the device knows the 50: its own GEMMs, not the library's.
    assert made["dW"].kind == "fused"
    assert by_name(cost.sweep_and_gradient(SMALL, TOY))["dW"].kind == "library"


def test_store_by_hand(monkeypatch):
    """A row takes 1000 (2 * 4 + 2) bytes: 30 fit, so four tiles of 25; 50 active rows fill two."""
    monkeypatch.setattr(cost, "STORE_BYTES", 300_000)
    made = cost.store(SMALL, TOY, rho=0.5)
    steps = by_name(made)
    logits, dz, dw = 2 * 4 * 100 * 1000, 2 * 50 * 1000, 4 * 256 * 1000
    assert steps["logits"].bytes == logits + 4 * 512_000 + 2 * 51_200
    assert steps["rows"].bytes == 1.5 * logits + dz + 40 * 100
    assert steps["dH"].bytes == dz + 2 * 512_000 + 51_200
    # dW: written, then read and written, then cast.
    assert steps["dW"].bytes == dz + 50 * 256 * 2 + 3 * dw + dw + 512_000
    assert made.workspace == 25 * 10_000 + dw


def test_rho_to_zero_leaves_the_sweep_and_zeros():
    made = cost.sweep_and_gradient(SMALL, TOY, rho=0.0)
    assert made.flops == cost.sweep(SMALL, TOY).flops
    assert made.bytes == cost.sweep(SMALL, TOY).bytes + 512_000 + 51_200
    frozen = cost.sweep_and_gradient(SMALL, TOY, rho=0.0, trained=False)
    assert frozen.bytes == cost.sweep(SMALL, TOY).bytes + 51_200


@pytest.mark.parametrize("strategy", [cost.sweep_and_gradient, cost.store])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_time_grows_with_rho_and_never_beats_the_peak(gpu, strategy):
    for shape in SHAPES:
        size = Size(*shape)
        times = [strategy(size, gpu, rho=rho).seconds(gpu) for rho in (0.0, 0.05, 0.2, 0.5, 1.0)]
        assert times == sorted(times)
        assert times[0] > 2 * size.gemm / gpu.peak
        assert times[-1] > cost.floor(size).flops / gpu.peak


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_traffic_of_the_sweep_is_within_a_tenth_of_the_least(shape, gpu):
    size = Size(*shape)
    ratio = cost.sweep(size, gpu).bytes / cost.least_sweep_bytes(size, gpu)
    assert 1.0 <= ratio <= MORE_GROUPS.get((gpu.name, shape), 1.10)


def test_two_sweeps_for_the_mixture_divergences():
    once, twice = (cost.sweep_and_gradient(SMALL, TOY, sweeps=count) for count in (1, 2))
    assert twice.flops - once.flops == 2 * SMALL.gemm


def test_a_chunk_of_rows_pays_for_adding_its_dw():
    made = {
        rows: cost.row_chunks(SMALL, rows=rows, row_bytes=10.0, add_bytes=8.0, launches=3)
        for rows in (100, 25)
    }
    assert made[25].flops == made[100].flops == 4 * SMALL.gemm
    extra = by_name(made[25])["dW"].bytes - by_name(made[100])["dW"].bytes
    assert extra == 3 * 8 * 256 * 1000


def test_break_even_is_where_both_take_as_long():
    gpu, size = GPUS["H100"], Size(4096, 1024, 151936)
    share = cost.break_even(size, gpu, rho=0.2)
    made = replace(gpu, fused=share)
    fused = cost.sweep_and_gradient(size, made, rho=0.2).seconds(made)
    assert fused == pytest.approx(cost.store(size, gpu, rho=0.2).seconds(gpu), rel=1e-3)


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA H100 PCIe", None),  # other peaks
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_driver_names_its_gpu(device, expected):
    gpu = cost.gpu_named(device)
    assert (gpu and gpu.name) == expected
