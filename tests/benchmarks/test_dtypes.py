"""bfloat16 beside float32: one problem, two dtypes, a table with their quotient."""

from __future__ import annotations

import torch

from benchmarks import dtypes
from benchmarks.problems import Shape, make_problem
from benchmarks.timing import Timing

SHAPE = Shape(8, 16, 64)


def test_the_bfloat16_problem_is_the_other_one_rounded():
    wide = make_problem(SHAPE, torch.float32)
    narrow = dtypes.in_bfloat16(wide)
    assert torch.equal(narrow.weight, wide.weight.bfloat16())
    assert narrow.weight.is_leaf
    assert narrow.student_hidden.is_leaf
    assert wide.weight.dtype == torch.float32


def test_a_row_holds_medians_and_their_quotients():
    found = {"float32": Timing([1.0, 2.0, 3.0]), "bfloat16": Timing([2.0, 3.0, 3.0])}
    assert dtypes.row(SHAPE, True, found) == "| 8/16/64 | trained | 2 | 3 | 1.50 | 1.50 | | |"
    found["torch"] = Timing([30.0])
    assert dtypes.row(SHAPE, False, found).endswith("| 1.50 | 1.50 | 30 | 10.0 |")


def test_the_command_prints_a_row_for_each_shape_and_head(capsys):
    dtypes.main(["--shapes", "8/16/64", "--rounds", "1", "--materialised"])
    lines = capsys.readouterr().out.splitlines()
    assert "bfloat16 products" in lines[0]
    assert [line.split(" | ")[1] for line in lines if line.startswith("| 8/16/64")] == [
        "trained",
        "frozen",
    ]
