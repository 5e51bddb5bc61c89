"""The whole command on a tiny random solver: workers, resume after a kill, files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from selfdistill.cli import app
from selfdistill.config import PromptConfig
from selfdistill.errors import EXIT_INTERRUPTED
from selfdistill.evaluation.scores import Evaluation
from selfdistill.training.divergence import DivergedError
from selfdistill.training.solver import load_solver
from studies.arithmetic.reproduce.arms import FULL, QUICK, Scale
from studies.arithmetic.reproduce.findings import collect
from studies.arithmetic.reproduce.job_list import STUDIES, Training, build_plan
from studies.arithmetic.reproduce.jobs import (
    PlanChangedError,
    Result,
    chosen_rate,
    is_finished,
    job_fingerprint,
    read_result,
    run_job,
)
from studies.arithmetic.reproduce.run import reproduce
from studies.arithmetic.reproduce.schedule import run_plan

TINY = Scale(
    milestones=(1, 2),
    rate_steps=1,
    rates=(1e-4, 1e-3),
    seeds=(0, 1),
    side_seeds=(0,),
    wording_seeds=(0,),
    problems=4,
    side_problems=3,
    samples=2,
    dev_problems=2,
    dev_samples=2,
    evaluate_every=1,
    strata=((0.3, 0.5),),
    dialects=(2,),
    analysed=(3, 2),
)


def quiet() -> Console:
    return Console(file=StringIO())


def write_result(output: Path, job: Training, **fields: object) -> None:
    folder = output / job.name
    folder.mkdir(parents=True)
    result = {"job": job_fingerprint(job), "seconds": 1.0, **fields}
    (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("studies", "workers"),
    [
        pytest.param(("copy",), 1, id="one study"),
        pytest.param(STUDIES, 2, id="all studies", marks=pytest.mark.slow),
    ],
)
def test_everything_runs_and_a_second_call_does_nothing_again(
    studies: Sequence[str], workers: int, solver_dir: Path, tmp_path: Path
):
    output, results = tmp_path / "runs", tmp_path / "results"
    arguments = {
        "output": output,
        "results": results,
        "workers": workers,
        "command": "selfdistill reproduce",
        "console": quiet(),
    }
    assert reproduce(str(solver_dir), TINY, studies, **arguments)
    plan = build_plan(str(solver_dir), TINY, studies)
    assert all(is_finished(job, output) for job in plan)

    findings = collect(output, TINY)
    assert findings.jobs == len(plan)
    found = {
        "main": findings.main,
        "copy": findings.copying,
        "difficulty": findings.difficulty,
        "wording": findings.wording,
    }
    assert [name for name in STUDIES if found[name] is not None] == list(studies)
    if findings.main is not None:
        assert [row.seeds for row in findings.main.rows] == [2] * 8 * len(TINY.milestones)
    page = (results / "README.md").read_text()
    assert str(tmp_path) not in page + (results / "results.json").read_text()
    for plot in results.glob("*.svg"):
        assert f"({plot.name})" in page

    rates = {name: read_result(output, name) for name in plan[-1].needs}
    best = max(rates.values(), key=lambda r: r.best_metric)
    last = read_result(output, plan[-1].name)
    assert last.learning_rate == best.learning_rate
    held_out = Evaluation.from_json((output / plan[-1].name / "held_out.json").read_text())
    assert held_out.split == "test"
    assert (len(held_out.problems), held_out.samples) == (TINY.problems, TINY.samples)
    early = output / plan[-1].name / "held_out-step-1.json"
    assert Evaluation.from_json(early.read_text()).problems != ()
    assert not list(output.glob("rates/**/held_out*.json"))
    assert not list(output.glob("**/checkpoints"))

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.json*")}
    (results / "README.md").unlink()
    assert reproduce(str(solver_dir), TINY, studies, **arguments)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.json*")} == before
    assert (results / "README.md").exists()


@pytest.mark.slow
def test_killed_it_goes_on_where_it_was(solver_dir: Path, tmp_path: Path):
    """Workers end with the process that started them; begun runs go on with the same numbers."""
    settings = replace(TINY, milestones=(3, 6), rate_steps=6)
    plan = build_plan(str(solver_dir), settings, ["main"])[:4]
    script = (
        "from pathlib import Path\n"
        "from rich.console import Console\n"
        "from studies.arithmetic.reproduce.job_list import Scale, build_plan\n"
        "from studies.arithmetic.reproduce.schedule import run_plan\n"
        "if __name__ == '__main__':\n"
        f"    scale = Scale(**{settings.__dict__!r})\n"
        f"    plan = build_plan({str(solver_dir)!r}, scale, ['main'])[:4]\n"
        f"    run_plan(plan, Path({str(tmp_path)!r}) / 'killed', workers=2, console=Console())\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    killed = tmp_path / "killed"
    deadline = time.monotonic() + 120
    while not list(killed.glob("rates/*/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.0)  # the workers notice
    begun = list(killed.glob("rates/*/*/metrics.jsonl"))
    assert begun
    seen = {path: path.read_bytes() for path in begun}
    time.sleep(1.0)
    assert {path: path.read_bytes() for path in begun} == seen

    assert run_plan(plan, killed, workers=2, console=quiet())
    calm = tmp_path / "calm"
    for job in plan:
        run_job(job, calm)
        curves = [
            [
                {k: v for k, v in json.loads(line).items() if k != "seconds"}
                for line in (output / job.name / "evaluations.jsonl").read_text().splitlines()
            ]
            for output in (killed, calm)
        ]
        assert curves[0] == curves[1]


def test_finished_jobs_are_not_touched(solver_dir: Path, tmp_path: Path):
    plan = build_plan(str(solver_dir), TINY, ["main"])
    job = plan[0]
    assert isinstance(job, Training)
    write_result(tmp_path, job, learning_rate=1e-4, best_metric=0.5)
    assert run_plan([job], tmp_path, workers=1, console=quiet())
    assert [path.name for path in (tmp_path / job.name).iterdir()] == ["result.json"]


def test_a_job_of_another_plan_is_refused_by_name(solver_dir: Path, tmp_path: Path):
    job = build_plan(str(solver_dir), TINY, ["main"])[0]
    assert isinstance(job, Training)
    write_result(tmp_path, job)
    other = build_plan(str(solver_dir), replace(TINY, dev_problems=3), ["main"])[0]
    assert other.name == job.name
    with pytest.raises(PlanChangedError, match=job.name):
        run_plan([other], tmp_path, workers=1, console=quiet())


def test_a_setting_that_is_newer_than_a_job_must_have_its_default(solver_dir: Path, tmp_path: Path):
    job = build_plan(str(solver_dir), TINY, ["main"])[0]
    assert isinstance(job, Training)
    write_result(tmp_path, job)
    path = tmp_path / job.name / "result.json"
    result = json.loads(path.read_text())
    del result["job"]["config"]["prompt"], result["job"]["config"]["updates_per_step"]
    del result["job"]["config"]["method"]["clip_low"]
    path.write_text(json.dumps(result))
    assert is_finished(job, tmp_path)
    for change in ({"updates_per_step": 2}, {"prompt": PromptConfig(max_length=9)}):
        other = replace(job, config=job.config.model_copy(update=change))
        with pytest.raises(PlanChangedError):
            is_finished(other, tmp_path)
    result["job"]["config"]["no_longer_there"] = 1
    path.write_text(json.dumps(result))
    with pytest.raises(PlanChangedError):
        is_finished(job, tmp_path)


def test_giving_up_later_is_no_other_job(solver_dir: Path):
    job = build_plan(str(solver_dir), TINY, ["main"])[0]
    assert isinstance(job, Training)
    assert job.config.max_empty_steps is None
    patient = replace(job, config=job.config.model_copy(update={"max_empty_steps": 10}))
    assert job_fingerprint(patient) == job_fingerprint(job)


def test_the_model_may_lie_elsewhere(tmp_path: Path):
    here, there = (build_plan(model, TINY, ["main"])[0] for model in ("a", "b"))
    assert job_fingerprint(here) == job_fingerprint(there)


def test_the_best_learning_rate_wins_and_one_that_diverged_does_not(tmp_path: Path):
    jobs = [job for job in build_plan("solver", Scale(), ["copy"]) if job.part == "rates"]
    names = [job.name for job in jobs]
    for job, metric, diverged in zip(jobs, (0.5, 0.7, 0.9), (None, None, "NaN"), strict=True):
        assert isinstance(job, Training)
        write_result(
            tmp_path,
            job,
            learning_rate=job.config.optimizer.learning_rate,
            best_metric=metric,
            diverged=diverged,
        )
    assert chosen_rate(names, tmp_path) == 3e-4
    assert chosen_rate(names[:1], tmp_path) == 1e-4
    with pytest.raises(DivergedError, match=r"1e-03 diverged: try lower"):
        chosen_rate(names[2:], tmp_path)


def test_a_stratum_reaches_the_task(solver_dir: Path):
    plan = build_plan(str(solver_dir), TINY, ["difficulty"])
    job = next(job for job in plan if job.part == "difficulty")
    assert not isinstance(job, Training)
    assert load_solver(job.config).task.predicted_success == (0.3, 0.5)


def test_results_say_seconds(tmp_path: Path):
    job = build_plan("solver", TINY, ["main"])[0]
    assert isinstance(job, Training)
    write_result(tmp_path, job)
    assert read_result(tmp_path, job.name) == Result(job=job_fingerprint(job), seconds=1.0)
    assert read_result(tmp_path, "nothing") is None


@pytest.mark.parametrize(
    ("options", "scale", "output", "results"),
    [
        ([], FULL, "runs/reproduce", "docs/results"),
        (["--quick"], QUICK, "runs/reproduce-quick", "runs/reproduce-quick/results"),
        (["--output", "a", "--results", "b"], FULL, "a", "b"),
    ],
)
def test_the_command(
    options: list[str], scale: Scale, output: str, results: str, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, object] = {}

    def record(model: str, *positional: object, **named: object) -> bool:
        seen.update(named, positional=positional)
        return False

    monkeypatch.setattr("studies.arithmetic.reproduce.run.reproduce", record)
    ended = CliRunner().invoke(app, ["reproduce", "--only", "copy", *options])
    assert ended.exit_code == EXIT_INTERRUPTED
    assert seen["positional"] == (scale, ("copy",))
    assert (seen["output"], seen["results"]) == (Path(output), Path(results))
    assert seen["workers"] == 2
