"""bfloat16 input beside float32 input: how much the loss takes of either, in one process.

    python -m benchmarks.dtypes
    SELFDISTILL_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
        MKL_ENABLE_INSTRUCTIONS=AVX2 python -m benchmarks.dtypes --materialised

The second call makes a better processor take the path of one with AVX2. `--materialised` adds
bfloat16 torch, which emulates its products there and takes minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.environment import environment
from benchmarks.peers import materialised, ours
from benchmarks.problems import Problem, Shape, make_problem
from benchmarks.timing import Timing, clock_for, interleave

SHAPES = (Shape(128, 576, 16384), Shape(256, 576, 32768), Shape(512, 576, 49152))
HEADER = (
    "| N/H/V | head | float32 s | bfloat16 s | bfloat16 / float32 | by round | torch bfloat16 s | "
    "torch / ours |\n|---|---|---:|---:|---:|---:|---:|---:|"
)


def steps(shape: Shape, *, trained_head: bool, with_torch: bool) -> dict[str, Callable[[], object]]:
    """The loss with its gradients on one problem in both dtypes, and bfloat16 torch."""
    wide = make_problem(shape, torch.float32)
    narrow = in_bfloat16(wide)
    made: dict[str, Callable[[], object]] = {
        "float32": ours(wide, trained_head=trained_head),
        "bfloat16": ours(narrow, trained_head=trained_head),
    }
    if with_torch:
        made["torch"] = materialised(narrow, trained_head=trained_head)
    return made


def in_bfloat16(problem: Problem) -> Problem:
    """The same problem, rounded; leaves of their own."""
    student, teacher, weight = (
        tensor.detach().bfloat16()
        for tensor in (problem.student_hidden, problem.teacher_hidden, problem.weight)
    )
    return replace(
        problem,
        student_hidden=student.requires_grad_(),
        teacher_hidden=teacher,
        weight=weight.requires_grad_(),
    )


def row(shape: Shape, trained_head: bool, found: dict[str, Timing]) -> str:
    """One line of the table."""
    wide, narrow, torchs = found["float32"], found["bfloat16"], found.get("torch")
    peer = "| | |"
    if torchs is not None:
        peer = f"| {torchs.median:.3g} | {torchs.over(narrow):.1f} |"
    return (
        f"| {shape} | {'trained' if trained_head else 'frozen'} | {wide.median:.3g} | "
        f"{narrow.median:.3g} | {narrow.over(wide):.2f} | {narrow.over_by_round(wide):.2f} {peer}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dtypes", description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=SHAPES, metavar="N/H/V")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--materialised", action="store_true", help="bfloat16 torch as well")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    record = environment("cpu") | {
        "rows": torch.ops.selfdistill.cpu_capability(),
        "bfloat16 products": torch.ops.selfdistill.gemm_bf16_available(),
    }
    print(", ".join(f"{name} {value}" for name, value in record.items()), HEADER, sep="\n\n")
    for shape in args.shapes:
        for trained_head in (True, False):
            timed = steps(shape, trained_head=trained_head, with_torch=args.materialised)
            found = interleave(timed, args.rounds, clock=clock_for("cpu"))
            print(row(shape, trained_head, found), flush=True)


if __name__ == "__main__":
    main()
