"""The contenders under pytest-benchmark: pytest benchmarks --benchmark-only [--shape N/H/V].

For figures to publish use benchmarks.compare: it interleaves, this runs one after the other.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.checks import check
from benchmarks.peers import contenders
from benchmarks.problems import DTYPES, Problem, Shape, make_problem

CONTENDERS = contenders()


@cache
def problem_of(shape: Shape, dtype: str, device: str) -> Problem:
    return make_problem(shape, DTYPES[dtype], device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key", CONTENDERS)
def test_loss(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, key: str, dtype: str
) -> None:
    """Forward and backward, after a check of loss and gradients."""
    shape, device = request.config.getoption("--shape"), request.config.getoption("--device")
    contender = CONTENDERS[key]
    if not contender.is_installed:
        pytest.skip(f"{contender.requires} is not installed: pip install 'selfdistill[dev]'")
    check(contender, DTYPES[dtype], device=device)
    step = contender.build(problem_of(shape, dtype, device))

    def finished_step() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"N/H/V {shape}, {dtype}"
    benchmark.pedantic(finished_step, rounds=5, warmup_rounds=1)
