from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import studies.arithmetic.demo.run
from selfdistill.config import Config
from selfdistill.training.run_folder import RunExistsError
from studies.arithmetic.demo.run import ARTIFACTS, Summary, demo


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Shrink the demo, and stand in for the report; the list holds the runs it was written for."""
    written: list[Path] = []

    def write_report(run: Path) -> Path:
        written.append(run)
        (run / "report.html").write_text("<html>")
        return run / "report.html"

    monkeypatch.setattr(studies.arithmetic.demo.run, "write_report", write_report)
    monkeypatch.setattr(studies.arithmetic.demo.run, "HELD_OUT_PROBLEMS", 6)
    monkeypatch.setattr(studies.arithmetic.demo.run, "HELD_OUT_SAMPLES", 3)
    return written


def make_config(solver_dir: Path, output: Path, *, seed: int = 0) -> Config:
    return Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": output,
            "device": "cpu",
            "seed": seed,
            "steps": 2,
            "prompts_per_step": 2,
            "task": {"step_counts": [1, 2]},
            "method": {"name": "stepalign", "group_size": 2},
            "rollout": {"max_new_tokens": 8},
            "evaluation": {"every": 1, "problems": 2, "samples": 2},
        }
    )


def run(config: Config, *, fresh: bool = False) -> tuple[Summary | None, str]:
    output = io.StringIO()
    summary = demo(config, fresh=fresh, console=Console(file=output, width=100))
    return summary, output.getvalue()


def figures(summary: Summary | None) -> tuple[object, ...]:
    assert summary is not None
    return summary.before, summary.after, summary.difference, summary.tokens_saved


def test_the_demo_from_start_to_finish_and_again(
    solver_dir: Path, tmp_path: Path, reports: list[Path]
) -> None:
    config = make_config(solver_dir, tmp_path / "demo")
    summary, text = run(config)
    assert summary is not None
    assert [summary.before.split, summary.before.samples] == ["test", 3]
    assert len(summary.before.problems) == 6
    assert [p.problem_id for p in summary.before.problems] == [
        p.problem_id for p in summary.after.problems
    ]
    assert 0 < summary.tokens_saved < 1
    assert summary.minutes > 0
    lines = text.splitlines()
    assert "before" in text
    assert any("Avg@3" in line and "%" in line for line in lines)
    assert str(tmp_path / "demo" / "report.html") in lines[-1]
    assert reports == [tmp_path / "demo"]
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {*ARTIFACTS, ".lock"}

    again, text = run(config)
    assert again == summary
    assert "is finished" in " ".join(text.split())  # wherever the console wraps
    assert "Avg@3" in text
    assert len(reports) == 1

    with pytest.raises(RunExistsError, match="another configuration"):
        run(make_config(solver_dir, tmp_path / "demo", seed=1))
    fresh, _ = run(config, fresh=True)
    assert figures(fresh) == figures(summary)  # one seed, the same numbers each time
    assert len(reports) == 2


def test_analysis_files_hold_wrong_attempts_before_and_after(
    solver_dir: Path, tmp_path: Path, reports: list[Path]
) -> None:
    run(make_config(solver_dir, tmp_path / "demo"))
    for name in ("before", "after"):
        data = json.loads((tmp_path / "demo" / f"analysis_{name}.json").read_text())
        assert data["localisation"]["attempts"] == len(data["attempts"]) > 0
        for attempt in data["attempts"]:
            start, stop = attempt["wrong_tokens"]
            assert 0 <= start < stop <= len(attempt["tokens"])
            for column in ("advantage", "kl", "entropy", "student_logprob", "teacher_logprob"):
                assert len(attempt[column]) == len(attempt["tokens"])


@pytest.mark.parametrize("stage", ["train", "summarise"])
def test_an_interrupted_demo_goes_on_where_it_was(
    solver_dir: Path,
    tmp_path: Path,
    reports: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    undisturbed, _ = run(make_config(solver_dir, tmp_path / "undisturbed"))
    config = make_config(solver_dir, tmp_path / "demo")

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(studies.arithmetic.demo.run, stage, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "demo").glob("*.json")}
    assert "held_out_before.json" in finished
    summary, _ = run(config)
    assert figures(summary) == figures(undisturbed)
    for name, time in finished.items():
        assert (tmp_path / "demo" / name).stat().st_mtime_ns == time


def test_fresh_removes_nothing_else(solver_dir: Path, tmp_path: Path, reports: list[Path]) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    run(make_config(solver_dir, folder), fresh=True)
    assert (folder / "notes.txt").read_text() == "mine"
