"""What one step asks the student, and how the answers are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfdistill.rollout.engine import Rollout, RolloutEngine, SamplingParams, sample
from selfdistill.seeds import derive_seed
from selfdistill.tasks.interface import Problem
from selfdistill.training.batch import leave_out_long_questions
from selfdistill.training.distributed import Ranks
from selfdistill.training.solver import Solver, sampling_params


@dataclass(frozen=True)
class Questions:
    """This rank's share of a step.

    Attributes:
        step: from 1.
        left_out: problems of the whole step that leave no room (`prompt.too_long` is "drop").
        asked: the problems.
        prompts: their token ids.
        group_size: rollouts of each.
        params: how they are drawn.
    """

    step: int
    left_out: int
    asked: list[Problem]
    prompts: list[list[int]]
    group_size: int
    params: SamplingParams

    @property
    def names(self) -> list[str]:
        """What to call each problem when something is wrong with it."""
        return [f"step {self.step}, problem {problem.id!r}" for problem in self.asked]

    def sample(self, engine: RolloutEngine) -> list[list[Rollout]]:
        """Return a group of rollouts for each problem; all ranks call it together.

        Raises:
            EngineError: see `selfdistill.rollout.engine.sample`.
        """
        groups = sample(
            engine,
            self.prompts,
            group_size=self.group_size,
            params=self.params,
            names=self.names,
        )
        engine.wait_for_group()
        return groups


def questions_of(
    step: int, *, solver: Solver, problems: Sequence[Problem], group_size: int, ranks: Ranks
) -> Questions:
    """Return what a step asks of this rank; all ranks call it together.

    Args:
        step: from 1.
        solver: knows the prompts and how long they may be.
        problems: of the whole run.
        group_size: rollouts of each problem.
        ranks: the processes that share the step.

    Raises:
        TaskError: no problem of the step leaves room.
    """
    config = solver.config
    first = (step - 1) * config.prompts_per_step
    drawn = problems[first : first + config.prompts_per_step]
    # What is left out is left out on all ranks, before they share the rest.
    left = drawn
    if config.prompt.too_long == "drop":
        left = leave_out_long_questions(solver, drawn, ranks)
    share = ranks.share(len(left))
    asked = list(left[share.start : share.stop])
    # Problem i of the step draws from the stream of this seed + i.
    seed = derive_seed(config.seed, "rollout", step) + share.start
    return Questions(
        step,
        len(drawn) - len(left),
        asked,
        [solver.context.student_prompt(problem) for problem in asked],
        group_size,
        sampling_params(config.rollout, seed),
    )
