"""How long a plan will take, from what its parts took on one thread."""

from __future__ import annotations

from collections.abc import Sequence

from studies.arithmetic.reproduce.job_list import (
    BaseEvaluation,
    Job,
    TestSet,
    TokenScores,
    Training,
)

# Seconds on one thread of the machine that made docs/results, measured while both were busy.
SECONDS_PER_STEP = 0.45
SECONDS_PER_DISTILLED_ROLLOUT = 0.023
SECONDS_PER_GRPO_ROLLOUT = 0.019
SECONDS_PER_ATTEMPT = 0.009
SECONDS_PER_SCORED_ATTEMPT = 0.02
SECONDS_PER_JOB = 2.0


def job_seconds(job: Job) -> float:
    """Return the seconds that a job should take from start to end."""
    match job:
        case Training():
            config = job.config
            rollouts = config.prompts_per_step * config.method.group_size
            per_rollout = (
                SECONDS_PER_GRPO_ROLLOUT
                if config.method.name == "grpo"
                else SECONDS_PER_DISTILLED_ROLLOUT
            )
            evaluations = 1 + -(-config.steps // config.evaluation.every)
            problems = config.evaluation.problems
            assert problems != "all"  # the task has no end
            dev = evaluations * problems * config.evaluation.samples
            return (
                SECONDS_PER_JOB
                + config.steps * (SECONDS_PER_STEP + rollouts * per_rollout)
                + SECONDS_PER_ATTEMPT * (dev + len(job.milestones) * _attempts(job.test))
            )
        case BaseEvaluation():
            return SECONDS_PER_JOB + 2 * SECONDS_PER_ATTEMPT * _attempts(job.test)
        case TokenScores():
            each = SECONDS_PER_ATTEMPT + SECONDS_PER_SCORED_ATTEMPT
            return SECONDS_PER_JOB + len(job.contexts) * each * _attempts(job.test)


def minutes(plan: Sequence[Job], *, workers: int) -> float:
    """Return the minutes of a whole plan, evenly spread over the workers."""
    return sum(map(job_seconds, plan)) / workers / 60


def _attempts(test: TestSet | None) -> int:
    return 0 if test is None else test.problems * test.samples
