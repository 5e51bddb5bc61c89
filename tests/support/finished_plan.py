"""Finished plans whose numbers are known, without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from selfdistill.analysis.localisation import Localisation
from selfdistill.config import save_config
from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.scores import Evaluation, summarize
from selfdistill.rollout.attempts import Attempts
from selfdistill.rollout.engine import Rollout
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.interface import Verdict
from studies.arithmetic.reproduce.arms import FULL
from studies.arithmetic.reproduce.job_list import BaseEvaluation, Job, TokenScores, Training
from studies.arithmetic.reproduce.jobs import TokenFigures, job_fingerprint

# Enough problems for intervals of no width where all of them have the same score.
SMALL = replace(FULL, problems=60, side_problems=60, dev_problems=8)

TASK = ArithmeticTask()


@cache
def evaluation(share: float, *, problems: int, samples: int, split: str = "test") -> Evaluation:
    """Every problem is solved by the same share of its attempts."""
    right = round(share * samples)
    attempts = [
        Attempts(
            problem,
            [Rollout([1] * 10, [0.0] * 10, "", True)] * samples,
            [Verdict(problem.answer, True, True, None, None, True)] * right
            + [Verdict(None, False, False, 1, (0, 1), False)] * (samples - right),
        )
        for problem in TASK.problems(split=split, count=problems)
    ]
    return summarize(attempts, TASK, split=split)


def figures(before: float, at: float, share: float) -> TokenFigures:
    def exact(value: float) -> Interval:
        return Interval(value, value - 0.01, value + 0.01)

    part = Localisation(
        attempts=50,
        problems=20,
        mean_before=exact(before),
        mean_at=exact(at),
        mean_after=exact(0.0),
        lowest_at=exact(-4.0),
        share_at=exact(share),
        kl_share_at=exact(share),
        tokens_at=exact(0.1),
        negative_before=exact(0.05),
    )
    # Partial repetition, whose share is 0.6, is the first context.
    times = 0.6 / share
    return TokenFigures(part, part, part, Interval(times, 0.9 * times, 1.1 * times))


def context_figures(label: str) -> TokenFigures:
    """The signs that the paper reports."""
    if label.startswith("partial"):
        return figures(0.2, -0.5, 0.6)
    if label.startswith("full"):
        return figures(0.2, 0.1, 0.1)
    if label == "omission":
        return figures(-0.5, -0.5, 0.2)
    return figures(-0.1, -0.5, 0.15)


def write_finished(job: Job, output: Path, share: Callable[[str], float]) -> None:
    folder = output / job.name
    folder.mkdir(parents=True)
    result = {"job": job_fingerprint(job), "seconds": 30.0}
    if isinstance(job, TokenScores):
        found = {label: asdict(context_figures(label)) for label in job.contexts}
        (folder / "figures.json").write_text(json.dumps(found))
    elif job.test is not None:
        text = evaluation(
            share(job.name), problems=job.test.problems, samples=job.test.samples
        ).to_json()
        (folder / "held_out.json").write_text(text)
        if isinstance(job, BaseEvaluation):
            (folder / "with_context.json").write_text(text)
    if isinstance(job, Training):
        for step in job.milestones[:-1]:
            (folder / f"held_out-step-{step}.json").write_text(
                (folder / "held_out.json").read_text()
            )
        rate = job.config.optimizer.learning_rate
        result |= {"learning_rate": rate, "best_metric": 0.5}
        save_config(job.config, folder / "config.yaml")
        dev = [
            {"step": step, **asdict(evaluation(value, problems=8, samples=4, split="dev"))}
            for step, value in ((0, 0.25), (10, 0.75), (20, 0.5), (50, 0.75))
        ]
        text = "".join(json.dumps(line) + "\n" for line in dev)
        (folder / "evaluations.jsonl").write_text(text)
    (folder / "result.json").write_text(json.dumps(result))
