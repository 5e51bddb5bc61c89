"""How one job runs: everything lands in its folder, and `result.json` says that it is done.

NAME/config.yaml, metrics.jsonl, evaluations.jsonl, checkpoints/     a normal training run
NAME/held_out.json, held_out-step-20.json                            test problems
NAME/behaviour.json, behaviour-longer.json                           the last of them, and others
NAME/first/                                                          a run that comes before
NAME/with_context.json                                               of a BaseEvaluation job
NAME/figures.json                                                    of a TokenScores job
NAME/result.json                                                     written last
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from io import StringIO
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.console import Console
from transformers.utils import logging as transformers_logging

from selfdistill.analysis.localisation import Localisation, first_step_wrong, localise, share_times
from selfdistill.analysis.tokens import TokenAnalysis, analyze, erroneous_attempts
from selfdistill.config import ArithmeticTaskConfig, Config
from selfdistill.errors import UserError
from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.scores import Evaluation, summarize
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.teacher import build_teacher
from selfdistill.rollout.attempts import Attempts, judge
from selfdistill.runlog import JsonLines, write_atomically
from selfdistill.seeds import derive_seed
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.build import build_task
from selfdistill.training.checkpoint import CheckpointStore
from selfdistill.training.divergence import DivergedError
from selfdistill.training.loop import train
from selfdistill.training.solver import Solver, load_solver, sampling_params
from studies.arithmetic.reproduce.behaviour import Behaviour, behaviour_of
from studies.arithmetic.reproduce.job_list import (
    BaseEvaluation,
    Job,
    Outside,
    TestSet,
    TokenScores,
    Training,
)

# Attempts at each problem that the base solver repeats with a critique of them.
TEACHER_SAMPLES = 4


class PlanChangedError(UserError):
    """The output folder holds a finished job of the same name that was another one."""


@dataclass(frozen=True)
class Result:
    """What is known of a finished job besides its files.

    Attributes:
        job: fingerprint of what was asked for.
        seconds: working time; of an interrupted job, of the call that finished it.
        learning_rate: of a training run.
        best_metric: the best dev Avg@k.
        diverged: why the training stopped early, or None.
    """

    job: dict[str, Any]
    seconds: float
    learning_rate: float | None = None
    best_metric: float | None = None
    diverged: str | None = None


@dataclass(frozen=True)
class TokenFigures:
    """How the advantage lies around the first wrong step of the base solver's wrong attempts.

    Attributes:
        all_wrong: every one of them.
        first_wrong: those whose step 1 is wrong, so that no right step comes before.
        later_wrong: the others.
        share_times: over these others, the share of |A| on the wrong step under the job's first
            context divided by that under this one.
    """

    all_wrong: Localisation
    first_wrong: Localisation
    later_wrong: Localisation
    share_times: Interval | None


_FIGURES = TypeAdapter(dict[str, TokenFigures])


def read_result(output: Path, name: str) -> Result | None:
    """Return a job's result, or None when it is not finished."""
    path = output / name / "result.json"
    return TypeAdapter(Result).validate_json(path.read_text("utf-8")) if path.exists() else None


def read_held_out(folder: Path, *, step: int | None = None) -> Evaluation:
    """Return the test evaluation of a finished job: the last one, or after an earlier milestone."""
    return Evaluation.from_json(_held_out_file(folder, step).read_text("utf-8"))


def read_with_context(folder: Path) -> Evaluation:
    """Return the accuracy of the teacher, that is of the base solver with the teacher's context."""
    return Evaluation.from_json((folder / "with_context.json").read_text("utf-8"))


_LAST = "held_out.json"


def _held_out_file(folder: Path, step: int | None = None) -> Path:
    return folder / (_LAST if step is None else f"held_out-step-{step}.json")


def behaviour_file(folder: Path, outside: str | None = None) -> Path:
    """Return where a finished job's `Behaviour` lies: on test problems, or on others."""
    return folder / ("behaviour.json" if outside is None else f"behaviour-{outside}.json")


def read_figures(output: Path, name: str) -> dict[str, TokenFigures]:
    """Return what a finished TokenScores job found, by context."""
    return _FIGURES.validate_json((output / name / "figures.json").read_text("utf-8"))


def is_finished(job: Job, output: Path) -> bool:
    """Tell whether a job is done.

    Raises:
        PlanChangedError: a job of that name is done, but it was another one.
    """
    result = read_result(output, job.name)
    if result is None:
        return False
    if not _is_same(result.job, job_fingerprint(job), job_fingerprint(job, changed_only=True)):
        raise PlanChangedError(
            f"{output / job.name} holds a finished job of another plan (--quick, or another "
            "version): choose another --output, or remove that folder"
        )
    return True


# Settings of a job that do not change its results: where things lie, and when it gives up.
NEUTRAL = ("model", "output_dir", "max_empty_steps")


def job_fingerprint(job: Job, *, changed_only: bool = False) -> dict[str, Any]:
    """Return a job as JSON, without the settings that do not change its results.

    Args:
        job: what is asked for.
        changed_only: without those that have their default value, either.
    """

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in NEUTRAL}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(json.loads(TypeAdapter(Job).dump_json(job, exclude_defaults=changed_only)))


def _is_same(recorded: Any, asked: Any, changed: Any) -> bool:
    """Compare a recorded job with one that is asked for.

    A setting that the record does not know is newer than the record: it must have its default.

    Args:
        recorded: the fingerprint that was written down.
        asked: the fingerprint of the job.
        changed: the same without what has its default value.
    """
    if not isinstance(recorded, dict) or not isinstance(asked, dict):
        return bool(recorded == asked)
    known = changed if isinstance(changed, dict) else {}
    return recorded.keys() <= asked.keys() and all(
        _is_same(recorded[name], value, known.get(name)) if name in recorded else name not in known
        for name, value in asked.items()
    )


def run_job(job: Job, output: Path) -> bool:
    """Do what is left of a job.

    Returns:
        False when an interrupt stopped it; the same call goes on from there.
    """
    transformers_logging.disable_progress_bar()
    folder = output / job.name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    match job:
        case Training():
            found = _train(job, output)
            if found is None:
                return False
        case BaseEvaluation():
            _evaluate_base(job, folder)
            found = Result(job={}, seconds=0.0)
        case TokenScores():
            _score_tokens(job, folder)
            found = Result(job={}, seconds=0.0)
    seconds = time.perf_counter() - start
    result = replace(found, job=job_fingerprint(job), seconds=seconds)
    write_atomically(folder / "result.json", json.dumps(asdict(result), indent=1))
    # All that is worth keeping is in the other files; the runs together would fill gigabytes.
    for run in (folder, folder / "first"):
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return True


def chosen_rate(rates: Sequence[str], output: Path) -> float:
    """Return the learning rate with the best dev accuracy; of equals the first, that is the lowest.

    A run that diverged is no candidate.

    Raises:
        DivergedError: all of them diverged.
    """
    best: tuple[float, float] | None = None
    for name in rates:
        result = read_result(output, name)
        assert result is not None
        assert result.best_metric is not None
        assert result.learning_rate is not None
        if result.diverged is None and (best is None or result.best_metric > best[0]):
            best = (result.best_metric, result.learning_rate)
    if best is None:
        raise DivergedError(f"all of {', '.join(rates)} diverged: try lower learning rates")
    return best[1]


def training_config(job: Training, output: Path) -> Config:
    """Return the configuration that a job really runs with."""
    config = job.config.model_copy(update={"output_dir": output / job.name})
    if not job.rates:
        return config
    optimizer = config.optimizer.model_copy(
        update={"learning_rate": chosen_rate(job.rates, output)}
    )
    return config.model_copy(update={"optimizer": optimizer})


def _train(job: Training, output: Path) -> Result | None:
    config = training_config(job, output)
    folder = config.output_dir
    diverged: str | None = None
    if job.first is not None:
        begun = _first_run(job.first, config)
        if begun is None:
            return None
        config, diverged = begun
    for step in job.milestones or (config.steps,):
        held_out = _held_out_file(folder, None if step == config.steps else step)
        if held_out.exists():
            continue
        try:
            if not _train_until(config.model_copy(update={"steps": step})):
                return None
        except DivergedError as error:
            diverged = str(error)
        if job.test is not None:
            best = CheckpointStore(folder / "checkpoints").best
            solver = load_solver(config, best)
            if step == config.steps:
                _look_outside(solver, job.outside, folder)
            _evaluate(solver, job.test, held_out)
    evaluations = JsonLines(folder / "evaluations.jsonl").read()
    return Result(
        job={},
        seconds=0.0,
        learning_rate=config.optimizer.learning_rate,
        best_metric=max(line["avg_at_k"]["value"] for line in evaluations),
        diverged=diverged,
    )


def _train_until(config: Config) -> bool:
    """Train or go on; False when an interrupt stopped it, in the last evaluation too."""
    if train(config, resume=True, console=Console(file=StringIO())).interrupted:
        return False
    evaluations = JsonLines(config.output_dir / "evaluations.jsonl").read()
    return bool(evaluations[-1]["step"] == config.steps)


def _first_run(first: Config, config: Config) -> tuple[Config, str | None] | None:
    """Return a run's configuration whose model is the best checkpoint of the run before it.

    And why that one diverged, or None; its best checkpoint is from before. Nothing is returned
    when an interrupt stopped it.
    """
    diverged = None
    optimizer = first.optimizer.model_copy(update={"learning_rate": config.optimizer.learning_rate})
    begun = first.model_copy(
        update={"output_dir": config.output_dir / "first", "optimizer": optimizer}
    )
    try:
        if not _train_until(begun):
            return None
    except DivergedError as error:
        diverged = str(error)
    best = CheckpointStore(begun.output_dir / "checkpoints").best
    return config.model_copy(update={"model": str(best.resolve())}), diverged


def _evaluate(solver: Solver, test: TestSet, path: Path) -> None:
    attempts = _attempts(solver, test, seed=derive_seed("held out", path.name))
    if path.name == _LAST:
        _behaviour(solver, attempts).write(behaviour_file(path.parent))
    write_atomically(path, summarize(attempts, solver.task, split="test").to_json())


def _look_outside(solver: Solver, outside: Sequence[Outside], folder: Path) -> None:
    """Describe attempts at problems unlike those of training."""
    for probe in outside:
        assert isinstance(solver.config.task, ArithmeticTaskConfig)
        changed = solver.config.task.model_copy(update={"step_counts": probe.step_counts})
        other = replace(solver, task=build_task(changed))
        attempts = _attempts(other, probe.test, seed=derive_seed("outside", probe.name))
        _behaviour(other, attempts).write(behaviour_file(folder, probe.name))


def _behaviour(solver: Solver, attempts: Sequence[Attempts]) -> Behaviour:
    assert isinstance(solver.task, ArithmeticTask)
    return behaviour_of(attempts, solver.task)


def _evaluate_base(job: BaseEvaluation, folder: Path) -> None:
    solver = load_solver(job.config)
    _look_outside(solver, job.outside, folder)
    _evaluate(solver, job.test, _held_out_file(folder))
    few = replace(job.test, samples=min(TEACHER_SAMPLES, job.test.samples))
    attempts = _attempts(solver, few, seed=derive_seed("attempts with context"))
    contexts = solver.build_method(job.config.method).contexts(attempts)
    prompts = [
        solver.context.teacher_prompt(attempt.problem, context)
        for attempt, of_group in zip(attempts, contexts, strict=True)
        for context in of_group
        if context is not None
    ]
    assert len(prompts) == few.problems * few.samples
    params = sampling_params(job.config.rollout, derive_seed("with context"))
    written = solver.engine.generate(prompts, group_size=1, params=params)
    groups = [
        [rollout for group in written[i : i + few.samples] for rollout in group]
        for i in range(0, len(written), few.samples)
    ]
    judged = judge(solver.task, [attempt.problem for attempt in attempts], groups)
    evaluation = summarize(judged, solver.task, split="test")
    write_atomically(folder / "with_context.json", evaluation.to_json())


def _attempts(solver: Solver, test: TestSet, *, seed: int) -> list[Attempts]:
    return solver.attempt(split="test", problems=test.problems, samples=test.samples, seed=seed)


def _score_tokens(job: TokenScores, folder: Path) -> None:
    figures: dict[str, TokenFigures] = {}
    first_context: list[TokenAnalysis] | None = None
    for label, config in job.contexts.items():
        # The references differ, so each context has a task of its own; the attempts are the same.
        solver = load_solver(config)
        attempts = _attempts(solver, job.test, seed=derive_seed("token scores"))
        teacher = build_teacher(config.method.teacher, solver.model)
        assert teacher is not None
        records = analyze(
            solver,
            teacher,
            solver.build_method(config.method),
            attempts,
            erroneous_attempts(attempts, limit=job.test.problems * job.test.samples, located=True),
            lm_heads=find_lm_heads(solver.model, teacher),
        )
        later = [r for r in records if not first_step_wrong(r)]
        if first_context is None:
            first_context = later
        figures[label] = TokenFigures(
            all_wrong=localise(records),
            first_wrong=localise([r for r in records if first_step_wrong(r)]),
            later_wrong=localise(later),
            share_times=share_times(first_context, later),
        )
    write_atomically(folder / "figures.json", _FIGURES.dump_json(figures, indent=1).decode())


def prepare_worker() -> None:
    """Take one thread (two processes of two threads each stall), and end with the parent."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this an orphan would go on writing where a restarted plan writes, too."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
