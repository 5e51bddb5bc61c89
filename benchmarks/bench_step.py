"""The whole step: padded two-pass, shared prefix, TRL's SDPO; time and peak memory on a CPU.

    python -m benchmarks.bench_step --output runs/benchmarks
    python -m benchmarks.bench_step --shapes 512/128/128/8 --rounds 3 --contenders naive shared
    pytest benchmarks/bench_step.py --benchmark-only

P/R/C/G: tokens of the prompt, of each response and of each context, and rollouts. Loss and
gradients are compared before anything is timed. benchmarks/step.py says what each step does and how
its bound is counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from benchmarks import arguments
from benchmarks.environment import environment
from benchmarks.memory import MALLOC, MEBIBYTE, ROOT, measure
from benchmarks.report import Table, markdown_table, print_table
from benchmarks.step import (
    CONTENDERS,
    SHAPES,
    Flops,
    ModelSize,
    StepProblem,
    StepShape,
    step_flops,
)
from benchmarks.timing import Timing, clock_for, interleave

LABELS = {
    "naive": "padded two-pass, fused loss",
    "shared": "shared prefix, fused loss",
    "trl": "TRL SDPO, full logits",
}
# Of the largest gradient; all are float32.
TOLERANCE = 1e-4
WARM_UP = StepShape(16, 8, 8, 2)


@dataclass(frozen=True)
class StepEntry:
    """One contender on one shape.

    Attributes:
        error: largest difference of a gradient from the naive step's, over its largest entry.
        speedup: median over rounds of the naive step's time over this one's in that round.
        bound: the same ratio of floating-point operations.
        peak_bytes: most memory beyond weights and gradients; None if not measured.
    """

    key: str
    shape: str
    timing: Timing
    error: float
    flops: Flops
    speedup: float
    bound: float
    peak_bytes: int | None = None


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    size = ModelSize(family=args.family, layers=args.layers, vocabulary=args.vocabulary)
    if args.memory_of is not None:
        print(measure_peak(args.memory_of, StepProblem(args.shapes[0], size)))
        return
    console = Console()
    facts = environment("cpu") | {"model": asdict(size), "rounds": args.rounds}
    for fact, value in facts.items():
        console.print(f"{fact}: {value}", highlight=False)
    entries: list[StepEntry] = []
    for shape in args.shapes:
        entries += compare(shape, size, args, console)
        write(args.output, facts, entries)
        print_table(console, table(entries))
    console.print(f"wrote step.md and step.json to {args.output}", highlight=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, size = parser.add_argument, ModelSize()
    # fmt: off
    add("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="P/R/C/G")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add("--family", choices=("llama", "qwen3"), default=size.family)
    add("--layers", type=arguments.positive, default=size.layers)
    add("--vocabulary", type=arguments.positive, default=size.vocabulary)
    add("--rounds", type=arguments.positive, default=5, help="timed rounds, after a discarded one")
    add("--threads", type=arguments.positive, default=torch.get_num_threads())
    add("--no-memory", dest="memory", action="store_false",
        help="leave out the peaks, each of which takes a process of its own")
    add("--memory-of", choices=CONTENDERS, help="only print one step's peak, in this process")
    add("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    # fmt: on
    return parser.parse_args(argv)


def _shape(text: str) -> StepShape:
    try:
        return StepShape.parse(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def compare(
    shape: StepShape, size: ModelSize, args: argparse.Namespace, console: Console
) -> list[StepEntry]:
    """Check, time and measure the contenders on one shape."""
    problem = StepProblem(shape, size)
    keys = [key for key in CONTENDERS if key in {"naive", *args.contenders}]
    if "trl" in keys and importlib.util.find_spec("trl") is None:
        console.print("without trl, which is not installed: pip install trl==1.16.0")
        keys.remove("trl")
    steps = {key: CONTENDERS[key](problem) for key in keys}
    errors = check(problem, keys)
    with console.status("") as status:
        timings = interleave(
            steps,
            args.rounds,
            clock=clock_for("cpu"),
            on_step=lambda key: status.update(f"{shape}: {key}"),
        )
    problem.model.zero_grad(set_to_none=True)
    flops = {key: step_flops(problem, share=key == "shared") for key in keys}
    return [
        StepEntry(
            key=key,
            shape=str(shape),
            timing=timings[key],
            error=errors[key],
            flops=flops[key],
            speedup=timings["naive"].over_by_round(timings[key]),
            bound=flops["naive"].total / flops[key].total,
            peak_bytes=_peak_in_a_process(key, shape, args) if args.memory else None,
        )
        for key in keys
    ]


def check(problem: StepProblem, keys: Sequence[str]) -> dict[str, float]:
    """Largest relative difference of loss and gradients from the naive step's.

    Raises:
        RuntimeError: it is too large, so the times would be of different steps.
    """
    expected = gradients(problem, "naive")
    errors = {}
    for key in keys:
        found = gradients(problem, key)
        errors[key] = max(
            float((found[name] - expected[name]).abs().max() / expected[name].abs().max())
            for name in expected
        )
        if not errors[key] <= TOLERANCE:
            raise RuntimeError(
                f"{key} at {problem.shape}: gradients differ from the naive step's by "
                f"{errors[key]:.1e} (relative), expected at most {TOLERANCE:.0e}"
            )
    return errors


def gradients(problem: StepProblem, key: str) -> dict[str, torch.Tensor]:
    """The loss and the gradient of every parameter."""
    loss = CONTENDERS[key](problem)()
    named = problem.model.named_parameters()
    return {"loss": loss} | {name: p.grad.clone() for name, p in named if p.grad is not None}


def measure_peak(key: str, problem: StepProblem) -> int:
    """Bytes at the peak of one step beyond weights and gradients, after a small one to warm up."""
    warm_up = StepProblem(WARM_UP, problem.size)
    CONTENDERS[key](warm_up)()
    del warm_up
    step = CONTENDERS[key](problem)
    model = problem.model
    model.zero_grad(set_to_none=True)

    def run() -> list[torch.Tensor | None]:
        step()
        return [p.grad for p in model.parameters()]

    return measure(run, "cpu")


def _peak_in_a_process(key: str, shape: StepShape, args: argparse.Namespace) -> int:
    command = [
        sys.executable, "-m", "benchmarks.bench_step", "--memory-of", key, "--shapes", str(shape),
        "--family", args.family, "--layers", str(args.layers),
        "--vocabulary", str(args.vocabulary), "--threads", str(args.threads),
    ]  # fmt: skip
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | MALLOC, check=False
    )
    if run.returncode != 0:
        raise RuntimeError(f"memory of {key} at {shape}: {run.stderr[-2000:]}")
    return int(run.stdout.split()[-1])


def table(entries: Sequence[StepEntry]) -> Table:
    """One line for each contender and shape."""
    body = []
    for entry in entries:
        peak = "" if entry.peak_bytes is None else f"{entry.peak_bytes / MEBIBYTE:,.0f}"
        seconds = entry.timing.median
        body.append(
            (
                LABELS[entry.key],
                entry.shape,
                f"{seconds:.2f} (±{50 * entry.timing.spread:.0f} %)",
                f"{entry.speedup:.2f}",
                f"{entry.bound:.2f}",
                f"{entry.flops.total / 1e9:,.0f}",
                f"{entry.flops.total / 1e9 / seconds:,.0f}",
                peak,
                f"{entry.error:.0e}",
            )
        )
    head = (
        "Step", "P/R/C/G", "s", "Speedup", "FLOP bound", "GFLOP", "GFLOP/s", "Peak, MiB",
        "Gradient error",
    )  # fmt: skip
    return Table("One step, forward and backward, float32 on a CPU", head, body)


def write(folder: Path, facts: dict[str, Any], entries: Sequence[StepEntry]) -> None:
    """step.json and step.md."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"environment": facts, "entries": [asdict(entry) for entry in entries]}
    (folder / "step.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [f"- {fact}: {value}" for fact, value in facts.items()]
    (folder / "step.md").write_text("\n".join([*lines, *markdown_table(table(entries)), ""]))


# ---- pytest-benchmark ----------------------------------------------------------------------------


@cache
def _problem(shape: StepShape) -> StepProblem:
    return StepProblem(shape, ModelSize())


@pytest.mark.parametrize("key", CONTENDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(benchmark: BenchmarkFixture, shape: StepShape, key: str) -> None:
    """Check against the naive step, then time."""
    if key == "trl":
        pytest.importorskip("trl", reason="pip install trl==1.16.0")
    problem = _problem(shape)
    check(problem, [key])
    benchmark.group = f"step, P/R/C/G {shape}"
    benchmark.pedantic(CONTENDERS[key](problem), rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    main()
