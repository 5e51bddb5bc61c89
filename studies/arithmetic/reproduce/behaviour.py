"""What attempts are like besides right or wrong: how they differ, how sure the solver is of them.

One file for each set of problems, with a number a problem, so that intervals can resample problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from selfdistill.rollout.attempts import Attempts
from selfdistill.runlog import write_atomically
from selfdistill.tasks.arithmetic import ArithmeticTask


@dataclass(frozen=True)
class Behaviour:
    """Attempts at some problems; each field has a number for each problem.

    Attributes:
        right: the share of attempts with the right answer.
        leading: the share of the steps that come before the first wrong one, mean over attempts.
        distinct: how many different texts are among the attempts whose every step is right.
        surprisal: mean of -log p over the sampled tokens (nats), an estimate without bias of the
            entropy of the distributions that they were drawn from.
        tokens: mean length of an attempt.
    """

    right: tuple[float, ...]
    leading: tuple[float, ...]
    distinct: tuple[int, ...]
    surprisal: tuple[float, ...]
    tokens: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> Behaviour:
        """Read what `write` wrote."""
        return TypeAdapter(Behaviour).validate_json(path.read_text("utf-8"))

    def write(self, path: Path) -> None:
        """Write a file of JSON, whole or not at all."""
        write_atomically(path, TypeAdapter(Behaviour).dump_json(self).decode() + "\n")


def behaviour_of(attempts: Sequence[Attempts], task: ArithmeticTask) -> Behaviour:
    """Describe attempts at arithmetic problems, at least one each."""
    return Behaviour(
        right=tuple(_mean([float(v.correct) for v in each.verdicts]) for each in attempts),
        leading=tuple(_leading(each, task) for each in attempts),
        distinct=tuple(
            len({r.text for r, v in zip(each.rollouts, each.verdicts, strict=True) if v.strict})
            for each in attempts
        ),
        surprisal=tuple(
            -_mean([p for rollout in each.rollouts for p in rollout.policy_logprobs])
            for each in attempts
        ),
        tokens=tuple(_mean([float(len(r.token_ids)) for r in each.rollouts]) for each in attempts),
    )


def _leading(attempts: Attempts, task: ArithmeticTask) -> float:
    steps = len(task.write_steps(attempts.problem, first=1, like="")) - 1  # the answer is none
    return _mean(
        [len(task.leading_steps(attempts.problem, r.text)) / steps for r in attempts.rollouts]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
