"""The study of mechanisms: a fair plan, answers that follow from intervals, the whole command."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from selfdistill.cli import app
from selfdistill.config import Config, load_config
from selfdistill.errors import EXIT_INTERRUPTED
from selfdistill.evaluation.intervals import Interval
from selfdistill.places import PlaceTakenError
from selfdistill.rollout.attempts import judge
from selfdistill.rollout.engine import Rollout
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.arithmetic.traces import Operation, Question
from selfdistill.training.divergence import DivergedError
from selfdistill.training.loop import TrainResult, train
from studies.arithmetic.mechanisms.answers import QUESTIONS, answers, reached, verdict
from studies.arithmetic.mechanisms.arms import (
    ARMS,
    BY_KEY,
    ENTRY_CLIP,
    FULL,
    GRPO_MANY,
    QUICK,
    REFERENCES,
    REFSOL,
    RESTARTED,
    RETURNING,
    RETURNING_STOP,
    RETURNING_THRICE,
    STEPALIGN,
    STEPALIGN_COSINE,
    Scale,
    merged,
)
from studies.arithmetic.mechanisms.findings import Findings, Outside, Row, collect
from studies.arithmetic.mechanisms.job_list import build_plan, parse_studies
from studies.arithmetic.mechanisms.page import TEXT, write_results
from studies.arithmetic.mechanisms.run import reproduce
from studies.arithmetic.reproduce import jobs
from studies.arithmetic.reproduce.behaviour import behaviour_of
from studies.arithmetic.reproduce.budget import minutes
from studies.arithmetic.reproduce.job_list import RATES_SEED, Training, UnknownStudyError
from studies.arithmetic.reproduce.machine import environment

PLAN = build_plan("solver", FULL)
RUNS = [job for job in PLAN if isinstance(job, Training)]

TINY = Scale(
    steps=2,
    first_steps=1,
    rates=(1e-4, 1e-3),
    seeds=(0,),
    problems=3,
    samples=2,
    outside={"shorter": (3,)},
    outside_problems=2,
    outside_samples=1,
    dev_problems=2,
    dev_samples=1,
    evaluate_every=1,
)


def test_every_arm_has_as_many_rollouts_and_its_own_learning_rate() -> None:
    for job in RUNS:
        rollouts = job.config.prompts_per_step * job.config.method.group_size
        steps = job.config.steps + (0 if job.first is None else job.first.steps)
        is_many = f"/{GRPO_MANY.key}/" in job.name
        assert (rollouts, steps) == (64 if is_many else 8, FULL.steps), job.name
        assert (job.config.seed == RATES_SEED) == (job.test is None)
        if job.first is not None:  # other problems than the second run's
            assert job.first.seed not in {other.config.seed for other in RUNS}
            assert job.first.method.group_size * job.first.prompts_per_step == 8
    names = [job.name for job in PLAN]
    assert len(set(names)) == len(names)
    assert len(RUNS) == len(ARMS) * (len(FULL.rates) + len(FULL.seeds))
    assert minutes(PLAN, workers=2) < 120


def test_an_arm_says_all_that_it_changes() -> None:
    def settings(key: str) -> dict[str, object]:
        job = next(job for job in RUNS if job.name == f"mechanisms/{key}/seed-0")
        return job.config.model_dump(mode="json")

    usual = settings(STEPALIGN.key)
    clipped = settings(ENTRY_CLIP.key)
    assert clipped["method"]["loss"].pop("entry_clip") == 0.05
    assert usual["method"]["loss"].pop("entry_clip") is None
    assert clipped == usual
    assert merged({"a": {"name": "x", "b": 1}}, {"a": {"c": 2}}) == {
        "a": {"name": "x", "b": 1, "c": 2}
    }
    assert merged({"a": {"name": "x", "b": 1}}, {"a": {"name": "y"}}) == {"a": {"name": "y"}}


def test_those_who_return_do_so_at_every_scale_and_have_a_control_of_their_schedule() -> None:
    for scale in (FULL, QUICK):
        runs = [j for j in build_plan("solver", scale) if isinstance(j, Training)]
        by_arm = {job.name.split("/")[1]: job.config for job in runs}
        for arm in (RETURNING, RETURNING_STOP, RETURNING_THRICE):
            teacher = by_arm[arm.key].method.teacher
            assert (teacher.from_best, teacher.every) == (True, scale.returns_every)
            assert teacher.every < scale.steps  # or it would teach nobody
    against = {arm: question.against for question in QUESTIONS for arm in question.arms}
    for arm, control in against.items():
        ours, other = (
            next(j.config for j in RUNS if j.name == f"mechanisms/{each.key}/seed-0")
            for each in (arm, control)
        )
        if arm is not STEPALIGN_COSINE:
            assert ours.optimizer.schedule == other.optimizer.schedule, arm.key


def test_a_first_run_that_diverges_is_noted_and_does_not_end_the_study(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(config: Config, **options: Any) -> TrainResult:
        found = train(config, **options)
        if config.output_dir.name == "first":
            raise DivergedError("the loss is not finite")
        return found

    monkeypatch.setattr(jobs, "train", diverging)
    plan = build_plan(str(solver_dir), TINY, [RESTARTED])
    job = next(job for job in plan if isinstance(job, Training))
    assert jobs.run_job(job, tmp_path)
    result = jobs.read_result(tmp_path, job.name)
    assert result is not None
    assert result.diverged == "the loss is not finite"
    assert result.best_metric is not None


def test_every_arm_is_asked_about_or_is_a_reference() -> None:
    asked = {arm for question in QUESTIONS for arm in question.arms}
    assert asked | set(REFERENCES) == set(ARMS)
    for question in QUESTIONS:
        assert question.against in REFERENCES
        assert set(question.advice) == {"better", "worse", "not separated"}


def test_some_arms_bring_the_references() -> None:
    assert parse_studies(None) == ARMS
    assert parse_studies("entry-clip") == (*REFERENCES, ENTRY_CLIP)
    with pytest.raises(UnknownStudyError, match=r"got 'nothing', expected some of stepalign"):
        parse_studies("nothing")


def test_behaviour_of_attempts() -> None:
    task = ArithmeticTask()
    problem = task.problem(Question(47, (Operation("+", 8), Operation("+", 5))))
    right = "<step_1> now 47 plus 8 makes 55 <step_2> now 55 plus 5 makes 60 <answer> 60"
    other = right.replace("now 55", "so 55")
    wrong = "<step_1> now 47 plus 8 makes 55 <step_2> now 55 plus 5 makes 50 <answer> 50"
    texts = [right, right, other, wrong]
    rollouts = [Rollout([1, 2], [-1.0, 0.0], text, True) for text in texts]
    found = behaviour_of(judge(task, [problem], [rollouts]), task)
    assert found.right == (0.75,)
    assert found.leading == ((1 + 1 + 1 + 0.5) / 4,)
    assert found.distinct == (2,)
    assert found.surprisal == (0.5,)
    assert found.tokens == (2.0,)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.1, 0.2, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "not separated")],
)
def test_a_verdict_takes_the_whole_interval(low: float, high: float, said: str) -> None:
    assert verdict(Interval((low + high) / 2, low, high)) == said


def row(key: str, avg: float, **differences: float) -> Row:
    def exact(value: float) -> Interval:
        return Interval(value, value - 0.01, value + 0.01)

    return Row(
        key=key,
        label=BY_KEY[key].label,
        avg=exact(avg),
        pass_at_k=exact(1.0),
        distinct=exact(3.0),
        surprisal=exact(0.2),
        tokens=exact(49.0),
        outside={name: Outside(exact(0.0), exact(0.1)) for name in FULL.outside},
        per_seed=[avg] * 3,
        learning_rate=3e-4,
        dev={f"{rate:g}": avg for rate in FULL.rates},
        best_steps=[20, 30, 40],
        differences={name: exact(value) for name, value in differences.items()},
        seconds=60.0,
    )


def findings_of(restarted: float) -> Findings:
    rows = [
        row("stepalign", 0.893),
        row("stepalign-cosine", 0.9, stepalign=0.007),
        row("refsol", 0.874, stepalign=-0.019),
        row("grpo-many", 0.956, stepalign=0.063),
        row(
            "teacher-restarted",
            restarted,
            **{"stepalign": restarted - 0.893, "stepalign-cosine": restarted - 0.9},
        ),
        row("refsol-other-path", 0.5, stepalign=-0.393, refsol=-0.374),
        row("entry-clip", 0.893, stepalign=0.0),
    ]
    return Findings(None, None, {each.key: each for each in rows}, ["EMA teacher (0.9)"], 360.0)


def test_the_page_says_what_follows(tmp_path: Path) -> None:
    where = environment(command="selfdistill reproduce --study mechanisms", workers=2, seconds=360)
    findings = findings_of(0.956)
    assert [(a.arm.key, a.verdict) for a in answers(findings)] == [
        ("teacher-restarted", "better"),
        ("stepalign-cosine", "not separated"),
        ("entry-clip", "not separated"),
        ("refsol-other-path", "worse"),
    ]
    assert reached(findings) == [RESTARTED.label]  # 64 rollouts a step do not count
    assert reached(findings_of(0.94)) == []
    files = write_results(findings, FULL, where, tmp_path)
    page, tables = (tmp_path / name for name in ("mechanisms.md", "mechanisms-tables.md"))
    assert "**The target is reached.**" in page.read_text()
    assert "Not finished: EMA teacher (0.9)." in page.read_text()
    assert "$" not in page.read_text() + tables.read_text()
    text = page.read_text() + tables.read_text()
    assert all(f"({file.name})" in text for file in files if file.suffix == ".svg")
    assert len(page.read_text().split()) < 1000  # five minutes
    assert json.loads((tmp_path / "mechanisms.json").read_text())["answers"][0]["verdict"] == (
        "better"
    )
    missed = write_results(findings_of(0.94), FULL, where, tmp_path)[0].read_text()
    assert "**The target is missed.**" in missed
    page.write_text("somebody's page")
    with pytest.raises(PlaceTakenError, match="is not the page of an earlier"):
        TEXT.refuse_foreign_results(tmp_path)


def test_the_whole_study_and_a_second_call_does_nothing_again(
    solver_dir: Path, tmp_path: Path
) -> None:
    arms = (STEPALIGN, RESTARTED)
    output, results = tmp_path / "runs", tmp_path / "results"

    def call() -> bool:
        return reproduce(
            str(solver_dir),
            TINY,
            arms,
            output=output,
            results=results,
            workers=1,
            command="selfdistill reproduce --study mechanisms",
            console=Console(file=StringIO()),
        )

    assert call()
    findings = collect(output, TINY, (*arms, REFSOL))
    assert list(findings.rows) == [arm.key for arm in arms]
    assert findings.missing == [REFSOL.label]
    assert findings.base is not None
    assert findings.teacher is not None
    assert findings.rows[RESTARTED.key].differences.keys() == {STEPALIGN.key}
    assert not list(output.glob("**/checkpoints"))
    # The second run begins with what the first one kept.
    first = output / "mechanisms" / RESTARTED.key / "seed-0" / "first"
    assert (first / "metrics.jsonl").read_text().count("\n") == TINY.first_steps
    assert (first.parent / "metrics.jsonl").read_text().count("\n") == TINY.steps - TINY.first_steps
    second = load_config(first.parent / "config.yaml").optimizer
    begun = load_config(first / "config.yaml").optimizer
    assert begun.learning_rate == second.learning_rate
    assert (begun.schedule, second.schedule) == ("constant", "cosine")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json*")}
    assert call()
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.json*")} == before


@pytest.mark.parametrize(
    ("options", "scale", "output"),
    [([], FULL, "runs/mechanisms"), (["--quick"], QUICK, "runs/mechanisms-quick")],
)
def test_the_command(
    options: list[str], scale: Scale, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    def record(model: str, *positional: object, **named: object) -> bool:
        seen.update(named, positional=positional)
        return False

    monkeypatch.setattr("studies.arithmetic.mechanisms.run.reproduce", record)
    asked = ["reproduce", "--study", "mechanisms", "--only", "entry-clip", *options]
    assert CliRunner().invoke(app, asked).exit_code == EXIT_INTERRUPTED
    assert seen["positional"] == (scale, (*REFERENCES, ENTRY_CLIP))
    assert seen["output"] == Path(output)
    assert seen["results"] == (Path(output) / "results" if options else Path("docs/results"))
