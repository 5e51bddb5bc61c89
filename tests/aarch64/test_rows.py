"""The row kernels of csrc/cpu on aarch64: cross-compiled, and run by qemu on this machine.

They need no torch, so a small driver is all that runs there. What it writes is compared with
float64, and with what the same source writes when it is compiled for this machine.
"""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from cuda_build import compiler, run
from row_cases import (
    DIVERGENCE,
    DIVERGENCES,
    MIXED,
    STUDENT_LOGPROB,
    TEACHER_LOGPROB,
    TRANSFORMS,
    Row,
    assert_as_good_as_torch,
    make_rows,
)
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ("-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-static")

pytestmark = pytest.mark.skipif(
    shutil.which(CROSS_COMPILER) is None or shutil.which(EMULATOR) is None,
    reason="needs an emulator and a cross-compiler: apt-get install qemu-user "
    "g++-aarch64-linux-gnu",
)


@dataclass(frozen=True)
class Result:
    """What one driver did to a problem, by one of the kernels' two ways."""

    statistics: Tensor
    gradient: Tensor
    """[rows, columns], float32 whatever was asked for."""
    rest: Tensor
    """[rows, stride - columns], float32: what lies between the rows."""


# By a visit of whole rows, and by two slabs of columns.
Results: TypeAlias = tuple[Result, Result]


@dataclass(frozen=True)
class Case:
    """A problem in memory: rows `padding` apart, the second slab from column `split` on."""

    row: Row
    padding: int = 0
    bfloat16: bool = False

    @property
    def split(self) -> int:
        """A first slab that ends within a vector of any width."""
        return (2 * self.row.student.shape[1] + 2) // 3

    def to_bytes(self) -> bytes:
        """As tests/aarch64/driver.cpp reads it."""
        p = self.row
        rows, columns = p.student.shape
        biases = [
            torch.zeros(columns) if bias is None else bias
            for bias in (p.student_bias, p.teacher_bias)
        ]
        tiles = [
            torch.nn.functional.pad(tile, (0, self.padding), value=math.nan)
            for tile in (p.student, p.teacher)
        ]
        head = struct.pack(
            "<7q7d", rows, columns, columns + self.padding, p.divergence,
            p.student_bias is not None, self.bfloat16, self.split, p.scale, p.softcap,
            p.temperature, p.beta, p.policy_gradient, p.cross_entropy, p.entropy,
        )  # fmt: skip
        return head + b"".join(
            tensor.numpy().tobytes() for tensor in (*tiles, *biases, p.weight, p.targets)
        )

    def results(self, numbers: Tensor) -> tuple[Results, Tensor]:
        """The results at the front of what a driver wrote, and the rest of it."""
        rows, columns = self.row.student.shape
        found = []
        for starts in ([0], [0, self.split]):
            sizes = [rows * 10, rows * (columns + self.padding)]
            statistics, tile, numbers = numbers.tensor_split([sizes[0], sum(sizes)])
            tile = tile.view(rows, columns + self.padding)
            ends = [*starts[1:], columns]
            gradient = torch.cat(
                [
                    tile[:, begin:end].contiguous().view(torch.bfloat16)[:, : end - begin].float()
                    if self.bfloat16
                    else tile[:, begin:end]
                    for begin, end in zip(starts, ends, strict=True)
                ],
                dim=1,
            )
            found.append(Result(statistics.view(rows, 10), gradient, tile[:, columns:]))
        return (found[0], found[1]), numbers


@dataclass(frozen=True)
class Driver:
    """The command of a compiled driver, with a folder for its files."""

    command: tuple[str, ...]
    folder: Path

    def solve(self, cases: Sequence[Case]) -> list[Results]:
        """Run it once for all cases."""
        problems, results = self.folder / "problems", self.folder / "results"
        problems.write_bytes(
            struct.pack("<q", len(cases)) + b"".join(case.to_bytes() for case in cases)
        )
        run([*self.command, str(problems), str(results)])
        numbers = torch.frombuffer(bytearray(results.read_bytes()), dtype=torch.float32)
        solved = []
        for case in cases:
            found, numbers = case.results(numbers)
            solved.append(found)
        assert len(numbers) == 0
        return solved


def build(folder: Path, compile_with: str, *flags: str) -> str:
    driver = str(folder / f"driver-{compile_with}{''.join(flags)}")
    sources = [ROOT / "csrc/cpu/rows_default.cpp", ROOT / "tests/aarch64/driver.cpp"]
    run([compile_with, *FLAGS, *flags, *map(str, sources), "-o", driver])
    return driver


@pytest.fixture(scope="module")
def aarch64(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """As setup.py would compile it."""
    folder = tmp_path_factory.mktemp("aarch64")
    return Driver((EMULATOR, build(folder, CROSS_COMPILER)), folder)


def mixed_cases(*, bfloat16: bool = False) -> list[Case]:
    """Every loss through every transform, and rows of any length, with NaN between them."""
    return [
        Case(make_rows(4, 507, divergence=divergence, **transform, **terms), 3, bfloat16)
        for divergence, transform, terms in product(DIVERGENCES, TRANSFORMS, [{}, MIXED])
    ] + [
        Case(make_rows(3, columns, divergence=divergence, **MIXED), padding, bfloat16)
        for divergence, (columns, padding) in product(
            DIVERGENCES, [(2, 0), (3, 1), (17, 0), (1023, 1), (16001, 0)]
        )
    ]


def test_every_loss_is_as_good_as_torch(aarch64: Driver) -> None:
    cases = mixed_cases()
    for case, results in zip(cases, aarch64.solve(cases), strict=True):
        for found in results:
            assert_as_good_as_torch(case.row, found.gradient, found.statistics)
            assert found.rest.isnan().all()


@pytest.mark.slow
def test_fused_multiply_adds_are_all_that_differs_from_this_machine(tmp_path: Path) -> None:
    """Both have vectors of four lanes and add up in one order; elementary.h has no library call.

    The few logarithms in float64 are the C library's, which agree far below a float32 rounding.
    """
    unfused = "-ffp-contract=off"
    there = Driver((EMULATOR, build(tmp_path, CROSS_COMPILER, unfused)), tmp_path)
    here = Driver((build(tmp_path, compiler(), unfused),), tmp_path)
    cases = mixed_cases()
    for theirs, ours in zip(there.solve(cases), here.solve(cases), strict=True):
        for one, other in zip(theirs, ours, strict=True):
            assert torch.equal(one.statistics, other.statistics)
            assert torch.equal(one.gradient, other.gradient)


def test_a_bfloat16_gradient_is_the_float32_one_rounded(aarch64: Driver) -> None:
    exact = aarch64.solve(mixed_cases())
    rounded = aarch64.solve(mixed_cases(bfloat16=True))
    for wide, narrow in zip(exact, rounded, strict=True):
        for one, other in zip(wide, narrow, strict=True):
            assert torch.equal(other.gradient, one.gradient.bfloat16().float())
            assert torch.equal(other.statistics, one.statistics)
            assert other.rest.isnan().all()


def test_equal_models_give_exact_zero(aarch64: Driver) -> None:
    rows = [
        make_rows(5, 1203, offset=offset, divergence=divergence, policy_gradient=1.0)
        for divergence, offset in product(DIVERGENCES[1:], [0.0, 500.0])
    ]
    for results in aarch64.solve([Case(replace(row, teacher=row.student)) for row in rows]):
        for found in results:
            assert found.gradient.count_nonzero() == 0
            assert found.statistics[:, DIVERGENCE].count_nonzero() == 0
            logprobs = found.statistics[:, [STUDENT_LOGPROB, TEACHER_LOGPROB]]
            assert torch.equal(logprobs[:, 0], logprobs[:, 1])


def test_a_row_with_nan_stays_bad_and_alone(aarch64: Driver) -> None:
    rows = [make_rows(3, 507, divergence=divergence, **MIXED) for divergence in DIVERGENCES]
    clean = aarch64.solve([Case(row) for row in rows])
    for row in rows:
        row.student[1, 30] = math.nan
    for before, after in zip(clean, aarch64.solve([Case(row) for row in rows]), strict=True):
        for good, found in zip(before, after, strict=True):
            assert found.gradient[1].isnan().all()
            assert torch.equal(found.gradient[[0, 2]], good.gradient[[0, 2]])
            assert torch.equal(found.statistics[[0, 2]], good.statistics[[0, 2]])
