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
            runs = [config] if job.first is None else [job.first, config]
            steps = sum(run.steps for run in runs)
            evaluations = sum(1 + -(-run.steps // run.evaluation.every) for run in runs)
            problems = config.evaluation.problems
            assert problems != "all"  # the task has no end
            dev = evaluations * problems * config.evaluation.samples
            outside = sum(_attempts(probe.test) for probe in job.outside)
            test = len(job.milestones) * _attempts(job.test) + outside
            return (
                SECONDS_PER_JOB
                + steps * (SECONDS_PER_STEP + rollouts * per_rollout)
                + SECONDS_PER_ATTEMPT * (dev + test)
            )
        case BaseEvaluation():
            outside = sum(_attempts(probe.test) for probe in job.outside)
            return SECONDS_PER_JOB + SECONDS_PER_ATTEMPT * (2 * _attempts(job.test) + outside)
        case TokenScores():
            each = SECONDS_PER_ATTEMPT + SECONDS_PER_SCORED_ATTEMPT
            return SECONDS_PER_JOB + len(job.contexts) * each * _attempts(job.test)


def minutes(plan: Sequence[Job], *, workers: int) -> float:
    """Return the minutes of a whole plan, evenly spread over the workers."""
    return sum(map(job_seconds, plan)) / workers / 60


def _attempts(test: TestSet | None) -> int:
    return 0 if test is None else test.problems * test.samples
