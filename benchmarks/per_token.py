"""Losses whose upstream gradient the forward pass does not know, over the GEMMs they cannot avoid.

    python -m benchmarks.per_token [--shape N/H/V] [--dtype bfloat16] [--rounds 9] [--threads 2]

A loss of single tokens, a mask that ranks tokens by their advantage, log-probs and top-k. The floor
of each is timed in the same rounds: logits of the models that are scored, dH, and dW with a trained
head; a mask that keeps a share rho of the tokens needs only rho of dH and dW, but is held against
the dense floor. torch's own linear_cross_entropy is timed beside the log-probs, plain and in chunks
of 256 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import environment
from benchmarks.peers import floor
from benchmarks.problems import DTYPES, Problem, Shape, make_problem
from benchmarks.timing import Timing, clock_for, interleave
from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    fused_linear_distillation,
    fused_linear_logprobs,
)

Loss = Callable[[Problem, Tensor], Tensor]
FLOORS = {
    "4 GEMMs": ("forward_kl", True),
    "3 GEMMs, frozen": ("forward_kl", False),
    "3 GEMMs, one model": ("cross_entropy", True),
    "2 GEMMs, one model, frozen": ("cross_entropy", False),
}
# Tokens that torch's linear_cross_entropy scores at a time; its fastest of 64 to 512 here.
CHUNK = 256


@dataclass(frozen=True)
class Row:
    """One line of the table: a loss of a problem and a head, and its floor's name."""

    name: str
    loss: Loss
    floor: str

    @property
    def trained_head(self) -> bool:
        return FLOORS[self.floor][1]

    def step(self, problem: Problem) -> Callable[[], object]:
        """Forward and backward."""
        head = problem.head(self.trained_head)
        leaves = [problem.student_hidden, head] if self.trained_head else [problem.student_hidden]
        return lambda: torch.autograd.grad(self.loss(problem, head), leaves)


def distillation(**options: Any) -> Loss:
    """Forward KL; losses of single tokens are weighted outside."""

    def loss(problem: Problem, head: Tensor) -> Tensor:
        out = fused_linear_distillation(
            problem.student_hidden, problem.teacher_hidden, head, problem.targets, **options
        )
        return out.loss if out.loss.dim() == 0 else out.loss @ upstream(problem)

    return loss


def logprobs(**options: Any) -> Loss:
    """Weighted log-probs, with a part of the entropy where it has a gradient."""

    def loss(problem: Problem, head: Tensor) -> Tensor:
        out = fused_linear_logprobs(problem.student_hidden, head, problem.targets, **options)
        entropy = 0.01 * out.entropy if out.entropy.requires_grad else 0.0
        return -(out.logprobs + entropy) @ upstream(problem)

    return loss


def core(chunk: int | None) -> Loss:
    """torch's own, of which the mean is the only loss in chunks."""
    options = None if chunk is None else torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def loss(problem: Problem, head: Tensor) -> Tensor:
        return F.linear_cross_entropy(
            problem.student_hidden, head, problem.targets, options=options
        )

    return loss


def upstream(problem: Problem) -> Tensor:
    """[N], another weight for every token."""
    tokens = problem.shape.tokens
    return torch.linspace(0.5, 1.5, tokens) / tokens


TOP = AdvantageMask(top_fraction=0.2)
ROWS = (
    Row("mean, trained", distillation(), "4 GEMMs"),
    Row("per token, trained", distillation(reduction="none"), "4 GEMMs"),
    Row("per token, frozen", distillation(reduction="none"), "3 GEMMs, frozen"),
    Row("top_fraction 0.2, trained", distillation(advantage_mask=TOP), "4 GEMMs"),
    Row("top_fraction 0.2, frozen", distillation(advantage_mask=TOP), "3 GEMMs, frozen"),
    Row("top_k 32, trained", distillation(objective=Objective(top_k=32)), "4 GEMMs"),
    Row("log-probs and entropy, trained", logprobs(), "3 GEMMs, one model"),
    Row("log-probs and entropy, frozen", logprobs(), "2 GEMMs, one model, frozen"),
    Row("log-probs, frozen", logprobs(entropy="detached"), "2 GEMMs, one model, frozen"),
    Row("linear_cross_entropy, frozen", core(None), "2 GEMMs, one model, frozen"),
    Row(f"the same by {CHUNK} tokens", core(CHUNK), "2 GEMMs, one model, frozen"),
)


def line(row: Row, found: dict[str, Timing]) -> str:
    """Of the table."""
    timing, least = found[row.name], found[row.floor]
    return (
        f"| {row.name} | {row.floor} | {least.median:.3g} | {timing.median:.3g} | "
        f"{timing.over(least):.2f} | {timing.over_by_round(least):.2f} | {timing.spread:.0%} |"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.per_token", description=__doc__)
    parser.add_argument("--shape", type=Shape.parse, default=Shape(512, 576, 49152))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    steps: dict[str, Callable[[], object]] = {}
    for name, (objective, trained_head) in FLOORS.items():
        problem = make_problem(args.shape, dtype, objective=objective)
        steps[name] = floor(problem, trained_head=trained_head)
    problem = make_problem(args.shape, dtype, objective="forward_kl")
    steps |= {row.name: row.step(problem) for row in ROWS}
    found = interleave(steps, args.rounds, clock=clock_for("cpu"))
    print(", ".join(f"{name} {value}" for name, value in environment("cpu").items()))
    print(f"\nN/H/V {args.shape}, {args.dtype}\n")
    print("| loss | floor | its s | s | over floor | by round | spread |")
    print("|---|---|---:|---:|---:|---:|---:|")
    print("\n".join(line(row, found) for row in ROWS))


if __name__ == "__main__":
    main()
