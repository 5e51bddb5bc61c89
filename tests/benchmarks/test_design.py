"""The design of docs/gpu-design.md: hand-computed cases, and its aims on paper."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import cost, design
from benchmarks.cost import GPUS, Cost, Gpu, Size, Step
from selfdistill_kernels.backends.triton.plan import Configuration, Machine

# As the toy of test_cost.py, with kernels that specialise their warps and reach 0.8 of the peak.
SPECIALISED = Gpu(
    "toy", 1e12, 1e9, Machine("toy", 4, 49152, descriptors=False),
    Configuration(16, 32, 32, 1, 4, 2), 1.0, 0.5, 1.0, "no data sheet", specialised=0.8,
)  # fmt: skip
SMALL = Size(tokens=100, hidden=256, vocabulary=1000)


def by_name(made: Cost) -> dict[str, Step]:
    return {step.name: step for step in made.steps}


def test_gemms_of_the_design():
    """4 and 3 dense; 2 and a little with a tolerance, which recomputing doubles for two models."""
    for trained, products in ((True, 2), (False, 1)):
        dense = design.dense(SMALL, SPECIALISED, trained=trained)
        assert dense.flops == (2 + products) * SMALL.gemm
        kept = 0.14 / design.GATHERED
        emitted = design.tolerant(SMALL, SPECIALISED, kept=0.14, trained=trained)
        assert emitted.flops == pytest.approx((2 + products * kept) * SMALL.gemm)
        again = design.tolerant(SMALL, SPECIALISED, kept=0.14, trained=trained, recomputed=True)
        assert again.flops == pytest.approx((2 + (2 + products) * kept) * SMALL.gemm)


def test_the_dense_design_by_hand(monkeypatch):
    """Four tiles of rows; dH of 256 columns is one cluster's, which reads each pair once."""
    monkeypatch.setattr(cost, "STORE_BYTES", 300_000)
    inside = by_name(design.dense(SMALL, SPECIALISED))
    apart = by_name(design.dense(SMALL, SPECIALISED, in_product=False))
    pair, dz = 2 * 4 * 100 * 1000, 2 * 100 * 1000
    swept = cost.sweep(SMALL, SPECIALISED).bytes
    assert inside["sweep"].bytes == apart["sweep"].bytes == swept + pair + 3 * 512_000
    assert apart["rows"].bytes == pair + dz
    assert apart["dH"].bytes == dz + 4 * 512_000 + 51_200
    assert inside["dH"].bytes == apart["dH"].bytes + pair
    assert "rows" not in inside
    wide = by_name(design.dense(replace(SMALL, hidden=4096), SPECIALISED))
    far = by_name(design.dense(replace(SMALL, hidden=4096), SPECIALISED, in_product=False))
    assert wide["dH"].bytes == far["dH"].bytes + 2 * pair  # 16 blocks of columns, 8 in a cluster


@pytest.mark.parametrize(("name", "most"), [("H100", 46e-3), ("B200", 24e-3)])
def test_what_the_design_is_for(name, most):
    """The aims of docs/gpu-design.md: 46 and 24 ms dense, 0.65 of it at 2e-3, three quarters with a
    frozen head. Each rejected way misses one of them."""
    gpu, size = GPUS[name], Size(8192, 4096, 128256)
    dense = design.dense(size, gpu).seconds(gpu)
    assert cost.floor(size).flops / (gpu.specialised * gpu.peak) < dense <= most
    assert design.tolerant(size, gpu).seconds(gpu) <= 0.65 * most
    frozen = design.dense(size, gpu, trained=False).seconds(gpu)
    assert frozen == pytest.approx(0.75 * dense, rel=0.01)
    assert design.dense(size, gpu, in_product=False).seconds(gpu) > most
    assert design.tolerant(size, gpu, recomputed=True).seconds(gpu) > 0.65 * most
