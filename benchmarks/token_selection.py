"""What a loss of a few tokens costs beside the loss of all of them.

    python -m benchmarks.token_selection [--share 0.2] [--rounds 9]

Times the trainer's loss with its gradients, for each way of choosing tokens, in turns with the loss
of all tokens, on one thread in the time of the process, so that other work counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.problems import Shape
from selfdistill.config import LossConfig
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import ScoredTokens

SHAPE = Shape(512, 576, 49152)  # SmolLM2-135M


def ways(share: float) -> dict[str, dict[str, Any]]:
    """Settings of the loss, the one of all tokens first."""
    return {
        "all tokens": {},
        "entropy": {"token_selection": {"rule": "entropy", "share": share}},
        "confident": {"token_selection": {"rule": "confident", "share": share}},
        "|A|, largest": {"advantage_mask": {"top_fraction": share}},
    }


def tokens_of(shape: Shape) -> ScoredTokens:
    """One rollout of random hidden states, the teacher's near the student's."""
    generator = torch.Generator().manual_seed(0)
    count, hidden, vocabulary = shape.tokens, shape.hidden, shape.vocabulary
    student = torch.randn(count, hidden, generator=generator)
    nothing: Any = None
    return ScoredTokens(
        student_hidden=student.requires_grad_(),
        teacher_hidden=student.detach() + 0.3 * torch.randn(count, hidden, generator=generator),
        targets=torch.randint(0, vocabulary, (count,), generator=generator),
        rollout_index=torch.zeros(count, dtype=torch.int64),
        positions=torch.arange(count),
        statistics=nothing,
        rollout_group=torch.zeros(1, dtype=torch.int64),
    )


def ratios(share: float, rounds: int, *, trained: bool, shape: Shape = SHAPE) -> dict[str, float]:
    """Median time of each way over that of all tokens.

    Args:
        share: of the tokens.
        rounds: repetitions of all ways in turns.
        trained: whether the head gets a gradient.
        shape: tokens, hidden size and vocabulary.
    """
    torch.set_num_threads(1)
    scored = tokens_of(shape)
    layer = torch.nn.Linear(shape.hidden, shape.vocabulary, bias=False).requires_grad_(trained)
    torch.nn.init.normal_(layer.weight, std=shape.hidden**-0.5)
    head = LMHead(layer)
    losses = {name: DistillationLoss(LossConfig(**own)) for name, own in ways(share).items()}
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(rounds):
        for name, loss in losses.items():
            start = time.process_time()
            loss(scored, head, head, normalizer=1.0).loss.backward()
            times[name].append(time.process_time() - start)
            scored.student_hidden.grad = layer.weight.grad = None
    whole = statistics.median(times["all tokens"])
    return {name: statistics.median(taken) / whole for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=9)
    chosen = parser.parse_args()
    print(environment("cpu"))
    for trained in (True, False):
        found = ratios(chosen.share, chosen.rounds, trained=trained)
        print(f"head {'trained' if trained else 'frozen'}, {chosen.share:.0%} of the tokens:")
        for name, ratio in found.items():
            print(f"  {name:14} {ratio:.2f}")


if __name__ == "__main__":
    main()
