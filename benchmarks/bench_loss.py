"""The contenders under pytest-benchmark: pytest benchmarks --benchmark-only [--shape N/H/V].

On a GPU: pytest benchmarks -m gpu --benchmark-only. Its times come from events on the stream, and
each round takes another problem. For figures to publish use benchmarks.compare: it interleaves,
this runs one after the other.
"""

from __future__ import annotations

from functools import cache

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.checks import check
from benchmarks.contender import Contender
from benchmarks.peers import contenders
from benchmarks.problems import DTYPES, SHAPES, Problem, Shape, make_problem
from benchmarks.timing import EventTimer, rotate

KEYS = {
    objective: list(contenders(device="cuda", objective=objective))
    for objective in ("reverse_kl", "cross_entropy")
}
DEFAULT_SHAPES = {"cpu": Shape(256, 256, 16384), "cuda": SHAPES["cuda"][0]}
SETS = {"cpu": 1, "cuda": 3}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.benchmark(timer=EventTimer())]),
]


@cache
def problems_of(shape: Shape, dtype: str, device: str, objective: str) -> list[Problem]:
    """Kept for the contenders that follow."""
    problems_of.cache_clear()  # of the last shape only
    return [
        make_problem(shape, DTYPES[dtype], device=device, objective=objective, seed=seed)
        for seed in range(SETS[device])
    ]


@pytest.mark.parametrize("key", KEYS["reverse_kl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_loss(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, device: str, key: str, dtype: str
) -> None:
    """Forward and backward of the reverse KL, after a check of loss and gradients."""
    run(benchmark, request, device, key, dtype, "reverse_kl")


@pytest.mark.parametrize("key", KEYS["cross_entropy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, device: str, key: str, dtype: str
) -> None:
    """The same for cross entropy, which libraries without a divergence compute."""
    run(benchmark, request, device, key, dtype, "cross_entropy")


def run(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    device: str,
    key: str,
    dtype: str,
    objective: str,
) -> None:
    """Check, then time."""
    contender: Contender | None = contenders(device=device, objective=objective).get(key)
    if contender is None:
        pytest.skip("runs on a GPU only: pytest benchmarks -m gpu --benchmark-only")
    missing = contender.missing(device, dtype)
    if missing is not None:
        pytest.skip(missing)
    check(contender, DTYPES[dtype], device=device, objective=objective)
    shape = request.config.getoption("--shape") or DEFAULT_SHAPES[device]
    step = rotate([contender.build(p) for p in problems_of(shape, dtype, device, objective)])
    benchmark.group = f"{objective}, N/H/V {shape}, {dtype}"
    benchmark.pedantic(step, rounds=6, warmup_rounds=3)
