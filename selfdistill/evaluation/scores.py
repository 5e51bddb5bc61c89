"""How good a solver is: Pass@k, Maj@k and Avg@k with intervals over problems."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from selfdistill.evaluation.intervals import Interval, bootstrap
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import Task, Verdict


@dataclass(frozen=True)
class ProblemScore:
    """What `samples` attempts at one problem came to.

    Attributes:
        problem_id: the problem's stable identifier.
        correct: attempts with the right final answer.
        strict: attempts with the right answer that meet the task's further demand.
        majority: True when the most frequent answer is right.
        mean_tokens: mean length of its attempts; None where older files did not record it.
    """

    problem_id: str
    correct: int
    strict: int
    majority: bool
    mean_tokens: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a solver on one set of problems, `samples` attempts each.

    Attributes:
        split: which problems ("dev", "test").
        samples: k, the attempts per problem.
        pass_at_k: a problem counts when at least one attempt is right.
        maj_at_k: a problem counts when the most frequent answer is right.
        avg_at_k: mean share of right attempts.
        strict_avg_at_k: the same, demanding more than the right answer.
        finished: share of attempts that ended by themselves.
        mean_tokens: mean length of an attempt.
        problems: the score of every problem; what paired comparisons are made of.
        strict_means: what `strict_avg_at_k` demands, in the task's words; empty: nothing that
            anybody asked for.
        undecided: attempts that count as wrong because the checker ran out of time.
        too_long: problems that are not among these because their prompts leave no room for an
            answer (`prompt.too_long` is "drop").
        mean_reward: of all attempts, of a task whose rewards are more than right or wrong.
    """

    split: str
    samples: int
    pass_at_k: Interval
    maj_at_k: Interval
    avg_at_k: Interval
    strict_avg_at_k: Interval
    finished: float
    mean_tokens: float
    problems: tuple[ProblemScore, ...]
    strict_means: str = "every step right"
    undecided: int = 0
    too_long: int = 0
    mean_reward: float | None = None

    @property
    def merit(self) -> float:
        """What the best checkpoint is chosen by: the mean reward where there is one, or Avg@k."""
        return self.avg_at_k.value if self.mean_reward is None else self.mean_reward

    def to_json(self) -> str:
        """This evaluation as one line of JSON."""
        return TypeAdapter(Evaluation).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Read what `to_json` wrote."""
        return TypeAdapter(Evaluation).validate_json(text)


def summarize(
    attempts: Sequence[Attempts], task: Task, *, split: str, too_long: int = 0
) -> Evaluation:
    """Turn judged attempts into an evaluation.

    Args:
        attempts: the same number of attempts for every problem, at least one problem.
        task: says which answers agree.
        split: the name the result carries.
        too_long: problems that were left out.

    Raises:
        ValueError: no attempts, or an unequal number of them.
    """
    sizes = {len(attempt.rollouts) for attempt in attempts}
    if len(sizes) != 1:
        raise ValueError(
            f"attempts must hold the same number of rollouts for every problem, got {sorted(sizes)}"
        )
    (samples,) = sizes
    scores = tuple(
        ProblemScore(
            problem_id=a.problem.id,
            correct=sum(v.correct for v in a.verdicts),
            strict=sum(v.strict for v in a.verdicts),
            majority=majority,
            mean_tokens=sum(len(r.token_ids) for r in a.rollouts) / samples,
        )
        for a, majority in zip(
            attempts, majorities_are_correct(task, [a.verdicts for a in attempts]), strict=True
        )
    )
    given = [v.score for a in attempts for v in a.verdicts if v.score is not None]
    rollouts = [rollout for a in attempts for rollout in a.rollouts]
    return Evaluation(
        split=split,
        samples=samples,
        pass_at_k=bootstrap([pass_at_k(samples, s.correct, samples) for s in scores]),
        maj_at_k=bootstrap([float(s.majority) for s in scores]),
        avg_at_k=bootstrap([s.correct / samples for s in scores]),
        strict_avg_at_k=bootstrap([s.strict / samples for s in scores]),
        finished=sum(r.finished for r in rollouts) / len(rollouts),
        mean_tokens=sum(len(r.token_ids) for r in rollouts) / len(rollouts),
        problems=scores,
        strict_means=task.strict_means,
        undecided=sum(v.undecided for a in attempts for v in a.verdicts),
        too_long=too_long,
        mean_reward=sum(given) / len(given) if given else None,
    )


def majorities_are_correct(task: Task, groups: Sequence[Sequence[Verdict]]) -> list[bool]:
    """Return for each problem whether the most frequent answer is that of a right attempt.

    An answer that the checker could not decide has no vote: comparing it took too long already.
    """
    majorities = task.majorities(
        [[v.answer for v in verdicts if v.answer and not v.undecided] for verdicts in groups]
    )
    return [
        any(v.correct and v.answer == majority for v in verdicts)
        for verdicts, majority in zip(groups, majorities, strict=True)
    ]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased probability that k of `samples` attempts hold a right one (arXiv 2107.03374).

    Raises:
        ValueError: not 1 <= k <= samples, or not 0 <= correct <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie between 1 and samples={samples}, got {k}")
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must lie between 0 and samples={samples}, got {correct}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
