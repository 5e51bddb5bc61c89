"""What a gradient tolerance saves and what it costs: time over the floor beside the error.

    python -m benchmarks.tolerance [--activations FILE] [--rounds 5] [--threads 2] [--plot FILE]
        [--workspace BYTES]

Forward KL with a trained and with a frozen head, exact and with tolerances, over the bare products
of the same rounds: 4 with a trained head, 3 with a frozen one. Errors are of the whole dH and dW,
measured against the exact gradient, and the mean of what the output says. How many entries a
gradient needs depends on the distributions: --activations takes those of a real model
(benchmarks/activations.py), without it they are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.activations import read_problem
from benchmarks.environment import environment
from benchmarks.peers import floor
from benchmarks.problems import DTYPES, Problem, Shape, make_problem
from benchmarks.timing import Timing, clock_for, interleave
from selfdistill_kernels import DistillationOutput, fused_linear_distillation

TOLERANCES = (None, 1e-2, 2e-3, 1e-3)


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    tolerance: float | None
    trained: bool
    workspace: int | str = "auto"

    @property
    def name(self) -> str:
        head = "trained" if self.trained else "frozen"
        return f"{'exact' if self.tolerance is None else f'{self.tolerance:g}'}, {head}"

    @property
    def floor(self) -> str:
        return floor_name(trained=self.trained)

    def run(self, problem: Problem) -> tuple[DistillationOutput, tuple[Tensor, ...]]:
        """Forward and backward."""
        head = problem.head(self.trained)
        leaves = [problem.student_hidden, head] if self.trained else [problem.student_hidden]
        out = fused_linear_distillation(
            problem.student_hidden,
            problem.teacher_hidden,
            head,
            problem.targets,
            gradient_tolerance=self.tolerance,
            workspace=self.workspace,
        )
        return out, torch.autograd.grad(out.loss, leaves)


@dataclass(frozen=True)
class Errors:
    """Relative errors of dH and dW; NaN where there is none."""

    hidden: float
    weight: float
    said_hidden: float
    said_weight: float


def floor_name(*, trained: bool) -> str:
    return f"{3 + trained} GEMMs"


def errors_of(setting: Setting, problem: Problem) -> Errors | None:
    """What a tolerance costs; None for the exact gradient."""
    if setting.tolerance is None:
        return None
    _, exact = replace(setting, tolerance=None).run(problem)
    out, made = setting.run(problem)
    said = out.gradient_error
    assert said is not None
    apart = [
        float((a.float() - b.float()).norm() / b.float().norm())
        for a, b in zip(made, exact, strict=True)
    ]
    # Of the whole dH: each token's error counts as much as its gradient does.
    sizes = exact[0].float().norm(dim=1)
    hidden = float((said.hidden * sizes).norm() / sizes.norm())
    return Errors(
        apart[0], apart[1] if setting.trained else float("nan"), hidden, float(said.weight)
    )


def line(setting: Setting, found: dict[str, Timing], errors: Errors | None) -> str:
    """Of the table."""
    timing, least, exact = (
        found[name] for name in (setting.name, setting.floor, replace(setting, tolerance=None).name)
    )
    said = "| - | - | - | - |"
    if errors is not None:
        said = (
            f"| {errors.hidden:.2g} | {errors.said_hidden:.2g} | {errors.weight:.2g} | "
            f"{errors.said_weight:.2g} |"
        )
    return (
        f"| {setting.name} | {setting.floor} | {timing.median:.3g} | {timing.over(least):.2f} | "
        f"{timing.over_by_round(least):.2f} | {timing.over(exact):.2f} {said}"
    )


def plot(
    settings: Sequence[Setting], found: dict[str, Timing], errors: dict[str, Errors], to: Path
) -> None:
    """Error of dH against time over the floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for trained, marker in ((True, "o"), (False, "s")):
        chosen = [s for s in settings if s.trained == trained and s.name in errors]
        floor_timing = found[floor_name(trained=trained)]
        times = [found[s.name].over_by_round(floor_timing) for s in chosen]
        label = f"{'trained' if trained else 'frozen'} head, over {floor_name(trained=trained)}"
        (drawn,) = axes.plot(
            times, [errors[s.name].hidden for s in chosen], marker=marker, label=label
        )
        exact = found[Setting(None, trained).name].over_by_round(floor_timing)
        axes.axvline(exact, color=drawn.get_color(), linestyle=":", label="the same, exact")
    axes.set(yscale="log", xlabel="time over the floor", ylabel="relative error of dH")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(to)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tolerance", description=__doc__)
    parser.add_argument("--activations", type=Path, help="a file of benchmarks.activations")
    parser.add_argument("--shape", type=Shape.parse, default=Shape(512, 576, 49152))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workspace", type=int, help="bytes; auto by default")
    parser.add_argument("--plot", type=Path, help="a picture to write")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    if args.activations is None:
        problem = make_problem(args.shape, dtype, objective="forward_kl")
    else:
        problem = read_problem(args.activations, dtype, "forward_kl")
    settings = [
        Setting(tolerance, trained, args.workspace or "auto")
        for trained in (True, False)
        for tolerance in TOLERANCES
    ]
    steps: dict[str, Callable[[], object]] = {
        floor_name(trained=trained): floor(problem, trained_head=trained)
        for trained in (True, False)
    }
    for setting in settings:
        steps[setting.name] = partial(setting.run, problem)
    found = interleave(steps, args.rounds, clock=clock_for("cpu"))
    errors = {s.name: made for s in settings if (made := errors_of(s, problem)) is not None}
    print(", ".join(f"{name} {value}" for name, value in environment("cpu").items()))
    source = "random states" if args.activations is None else f"states of {args.activations.name}"
    print(
        f"\nN/H/V {problem.shape}, {args.dtype}, {source}, workspace {args.workspace or 'auto'}\n"
    )
    print(
        "| tolerance, head | floor | s | over it | by round | over exact | dH | said | dW | said |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for setting in settings:
        print(line(setting, found, errors.get(setting.name)))
    if args.plot is not None:
        plot(settings, found, errors, args.plot)


if __name__ == "__main__":
    main()
