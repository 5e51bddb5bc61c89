"""Folders that hold something already, that two processes want, or that cannot be written."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import ROOT

import selfdistill.analysis.run
import selfdistill.training.loop
import selfdistill.training.solver
from selfdistill import cli
from selfdistill.config import Config, load_config, save_config
from selfdistill.filtering import FilterExistsError, FilterSettings, filter_problems
from selfdistill.places import PlaceTakenError, alone_in, try_files
from selfdistill.runlog import JsonLines, LogError, write_atomically
from selfdistill.tasks.interface import TaskError
from selfdistill.training.checkpoint import CheckpointStore
from selfdistill.training.loop import train
from selfdistill.training.run_folder import RunExistsError, keep_config, refuse_other_run
from studies.arithmetic.demo.run import remove_artifacts
from studies.arithmetic.reproduce.results import TEXT

LOGS = ("metrics.jsonl", "evaluations.jsonl", "config.yaml")


def make_config(solver: Path, output: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "model": str(solver),
        "output_dir": output,
        "task": {"step_counts": [1]},
        "method": {"name": "refsol", "group_size": 1},
        "device": "cpu",
        "steps": 1,
        "prompts_per_step": 1,
        "rollout": {"max_new_tokens": 3},
        "evaluation": {"every": 9, "problems": 1, "samples": 1},
    }
    return Config.model_validate({**settings, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def finished(solver_dir: Path, tmp_path: Path) -> Config:
    """Return the configuration of a run of one step that is there."""
    config = make_config(solver_dir, tmp_path / "run")
    train(config)
    return config


@pytest.mark.parametrize("resume", [False, True])
def test_the_logs_of_a_run_without_checkpoints_stay(finished: Config, resume: bool) -> None:
    shutil.rmtree(finished.output_dir / "checkpoints")
    before = contents(finished.output_dir)
    assert set(before) == {*LOGS, "completions/step-000001.jsonl"}
    for config in (finished, finished.model_copy(update={"seed": 5})):
        with pytest.raises(RunExistsError, match=r"came to step 1, .* has no checkpoint .*output"):
            train(config, resume=resume)
    assert contents(finished.output_dir) == before


def test_checkpoints_without_a_link_are_not_trained_over(finished: Config) -> None:
    (finished.output_dir / "checkpoints" / "last").unlink()
    before = contents(finished.output_dir)
    with pytest.raises(RunExistsError, match=r"step-000001.* and no link `last`"):
        train(finished, resume=True)
    assert contents(finished.output_dir) == before


def test_a_copy_of_a_checkpoint_under_another_name_stays(finished: Config) -> None:
    checkpoints = finished.output_dir / "checkpoints"
    shutil.copytree(checkpoints / "last", checkpoints / "step-000001-good")
    train(finished.model_copy(update={"steps": 3}), resume=True)
    assert (checkpoints / "step-000001-good" / "state.json").exists()
    assert CheckpointStore(checkpoints).saved() == sorted(
        {(checkpoints / link).resolve().name for link in ("best", "last")}
    )


def test_a_configuration_in_its_own_folder_keeps_its_comments(
    solver_dir: Path, tmp_path: Path
) -> None:
    config = make_config(solver_dir, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    save_config(config, path)
    text = "# why it is so: ...\n" + path.read_text()
    path.write_text(text)
    train(load_config(path))
    assert path.read_text() == text
    longer = config.model_copy(update={"steps": 2})
    train(longer, resume=True)
    assert load_config(path) == longer
    assert (tmp_path / "run" / "config.until-step-000001.yaml").read_text() == text
    # The same step once more: no earlier one is lost.
    keep_config(config, step=1)
    keep_config(longer, step=1)
    assert load_config(path) == longer
    assert (tmp_path / "run" / "config.until-step-000001.yaml").read_text() == text
    assert load_config(tmp_path / "run" / "config.until-step-000001-2.yaml") == longer
    assert load_config(tmp_path / "run" / "config.until-step-000001-3.yaml") == config


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("text", "message"), [("steps: 1\n", "cannot read it"), (None, r"seed \(5 there, 0 here\)")]
)
def test_a_configuration_of_something_else_stays(
    solver_dir: Path, tmp_path: Path, text: str | None, message: str, resume: bool
) -> None:
    config = make_config(solver_dir, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    save_config(config.model_copy(update={"seed": 5}), path)
    if text is not None:
        path.write_text(text)
    before = path.read_bytes()
    with pytest.raises(RunExistsError, match=rf"config\.yaml is that of another run: .*{message}"):
        train(config, resume=resume)
    assert path.read_bytes() == before


def test_a_first_start_that_failed_takes_the_mended_configuration(
    solver_dir: Path, tmp_path: Path
) -> None:
    """It found its own config.yaml, with the setting that was wrong, and called it another run."""
    source = tmp_path / "problems.jsonl"
    lines = [json.dumps({"question": f"{n} + 1", "answer": n + 1}) for n in range(10, 13)]
    source.write_text("\n".join(lines))
    dev = tmp_path / "dev.jsonl"
    dev.write_text(json.dumps({"question": "1 + 1", "answer": 2}))
    settings = {
        "method": {"name": "grpo", "group_size": 2},
        "max_empty_steps": None,
        "evaluation": {"every": 9, "problems": 2, "samples": 1},
    }
    task = {"name": "jsonl", "splits": {"train": str(source)}, "checker": "plain"}
    config = make_config(solver_dir, tmp_path / "run", task=task, **settings)
    with pytest.raises(TaskError, match="has no dev problems"):
        train(config)
    assert not (config.output_dir / "config.yaml").exists()
    task = {**task, "splits": {"train": str(source), "dev": str(dev)}}
    mended = make_config(solver_dir, tmp_path / "run", task=task, **settings)
    assert train(mended).step == 1
    assert load_config(config.output_dir / "config.yaml") == mended


def test_a_run_killed_before_its_first_checkpoint_may_begin_again(
    solver_dir: Path, tmp_path: Path
) -> None:
    config = make_config(solver_dir, tmp_path / "run")
    keep_config(config, step=0)
    refuse_other_run(config, resume=False)  # nothing but its own configuration is there
    JsonLines(tmp_path / "run" / "evaluations.jsonl").append({"step": 0})
    with pytest.raises(RunExistsError, match="resume it"):
        refuse_other_run(config, resume=False)
    refuse_other_run(config, resume=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json\n", "line 1 is not a JSON object"),
        ('{"step": 1}\n[1]\n', "line 2 is not a JSON object .it is a list"),
        ('{"step": 1}\n{"st\n{"step": 2}\n', "line 2 is not a JSON object"),
        ("[" * 100_000 + "\n", "line 1 is not a JSON object"),
        ('{"step": ' + "9" * 5000 + "}\n", "line 1 .* .it holds a number of thousands of digits."),
        ("\xff\n", "line 1 is not a JSON object .its byte 0 is 0xff, which is no UTF-8."),
    ],
    ids=["text", "list", "interleaved", "deep", "digits", "latin-1"],
)
def test_a_log_that_is_none_is_named_and_stays(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LogError, match=rf"metrics\.jsonl, {message}"):
        JsonLines(path).keep_until(0)
    assert path.read_bytes() == text.encode("latin-1")
    path.write_text('{"loss": 1}\n')
    with pytest.raises(LogError, match="without a step"):
        JsonLines(path).keep_until(0)


def test_a_second_process_is_kept_out(finished: Config, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from selfdistill.places import alone_in\n"
        "with alone_in(Path(sys.argv[1])):\n"
        "    print('in', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(finished.output_dir)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "in\n"
        before = contents(finished.output_dir)
        with pytest.raises(PlaceTakenError, match=r"another process works in .*run"):
            train(finished.model_copy(update={"steps": 2}), resume=True)
        assert contents(finished.output_dir) == before
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert train(finished.model_copy(update={"steps": 2}), resume=True).step == 2


def test_what_holds_a_folder_may_take_it_again(tmp_path: Path) -> None:
    with alone_in(tmp_path), alone_in(tmp_path):
        pass
    with alone_in(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    with alone_in(tmp_path / "kept"):
        (tmp_path / "kept" / "file").touch()
    assert (tmp_path / "kept" / "file").exists()


def unwritable(folder: Path) -> Path:
    """A place below a file; a test may run as root, who may write into every folder."""
    (folder / "file").write_text("mine")
    return folder / "file" / "below"


def fail(*args: object, **kwargs: object) -> None:
    raise AssertionError("the work has started")


def test_places_are_tried_before_the_work_starts(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = unwritable(tmp_path)
    for module in (
        selfdistill.training.loop,
        selfdistill.training.solver,
        selfdistill.analysis.run,
    ):
        monkeypatch.setattr(module, "load_solver", fail)
    monkeypatch.setattr("selfdistill.filtering.load_solver", fail)
    with pytest.raises(OSError, match=r"cannot write into .*below"):
        train(finished.model_copy(update={"output_dir": place}))
    run = str(finished.output_dir)
    for command in (
        ["evaluate", run, "--output", str(place / "result.json")],
        ["analyze", run, "--output", str(place)],
        ["compare", run, "--output", str(place)],
        ["reproduce", "--results", str(place)],
    ):
        status, error = run_cli(monkeypatch, command)
        assert (status, "cannot write into" in error) == (1, True), command
    with pytest.raises(OSError, match="cannot write into"):
        filter_problems(finished, place / "out", FilterSettings(), console=quiet())


def quiet() -> Console:
    return Console(file=io.StringIO())


def run_cli(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> tuple[int, str]:
    """Run the command line as its entry point does; return the status and what went to stderr."""
    errors = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["selfdistill", *arguments])
        patch.setattr(sys, "stderr", errors)
        with pytest.raises(SystemExit) as caught:
            cli.main()
    return int(caught.value.code or 0), " ".join(errors.getvalue().split())


@pytest.mark.parametrize("command", ["evaluate", "analyze", "compare"])
def test_results_that_are_there_are_replaced_only_when_asked(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    output = tmp_path / "results"
    few = ["--problems", "1", "--samples", "1"]
    arguments, files = {
        "evaluate": ([*few, "--output", str(output / "result.json")], ["result.json"]),
        "analyze": ([*few, "--attempts", "1", "--output", str(output)], ["analysis.md"]),
        "compare": (["--output", str(output)], ["compare.md"]),
    }[command]
    output.mkdir()
    (output / files[0]).write_text("mine")
    call = [command, str(finished.output_dir), *arguments]
    status, error = run_cli(monkeypatch, call)
    assert status == 1
    assert "is there already: choose another --output, or replace it with --overwrite" in error
    assert contents(output) == {files[0]: b"mine"}
    assert run_cli(monkeypatch, [*call, "--overwrite"])[0] == 0
    assert (output / files[0]).read_text() != "mine"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlaceTakenError, match="expected the name of a file"):
        try_files([tmp_path], overwrite=True)


def filter_task(folder: Path) -> Path:
    source = folder / "problems.jsonl"
    lines = [json.dumps({"question": f"{n} + 1 mod 100", "answer": n + 1}) for n in range(10, 13)]
    source.write_text("\n".join(lines))
    return source


@pytest.mark.parametrize("name", ["problems.jsonl", "link.jsonl"])
def test_a_filter_does_not_overwrite_its_source(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = filter_task(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(source)
    before = source.read_bytes()
    task = {"name": "jsonl", "splits": {"train": str(source)}, "checker": "plain"}
    config = make_config(solver_dir, tmp_path / "run", task=task, method={"name": "grpo"})
    monkeypatch.setattr("selfdistill.filtering.load_solver", fail)
    with pytest.raises(FilterExistsError, match="is there already, and no filter wrote it"):
        filter_problems(config, tmp_path / name, FilterSettings(), console=quiet())
    assert source.read_bytes() == before


def filter_arithmetic(solver_dir: Path, output: Path) -> None:
    config = make_config(solver_dir, output.parent / "run", method={"name": "stepalign"})
    settings = FilterSettings(samples=1, split="dev", problems=1)
    filter_problems(config, output, settings, console=quiet())


def test_a_filtered_file_that_somebody_changed_stays(solver_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "hard.jsonl"
    filter_arithmetic(solver_dir, output)
    filtered = output.read_bytes()
    filter_arithmetic(solver_dir, output)  # nothing is left to do
    assert output.read_bytes() == filtered
    output.write_text("mine")
    with pytest.raises(FilterExistsError, match=r"somebody changed it.*journal"):
        filter_arithmetic(solver_dir, output)
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "error"),
    [("notes\n", LogError), ("notes", FilterExistsError), ('{"id": 1}\n', FilterExistsError)],
)
def test_a_journal_that_is_none_stays(
    solver_dir: Path, tmp_path: Path, text: str, error: type[Exception]
) -> None:
    journal = tmp_path / "hard.jsonl.journal"
    journal.write_text(text)
    with pytest.raises(error, match=r"hard\.jsonl\.journal"):
        filter_arithmetic(solver_dir, tmp_path / "hard.jsonl")
    assert journal.read_text() == text


def test_a_fresh_demo_removes_no_training_run(finished: Config) -> None:
    before = contents(finished.output_dir)
    with pytest.raises(RunExistsError, match=r"no demo .*--fresh would remove it"):
        remove_artifacts(finished.output_dir)
    assert contents(finished.output_dir) == before


def test_results_replace_no_other_page(tmp_path: Path) -> None:
    TEXT.refuse_foreign_results(tmp_path)
    (tmp_path / "README.md").write_text("# The paper's question in miniature\n\nolder words")
    TEXT.refuse_foreign_results(tmp_path)
    (tmp_path / "README.md").write_text("# My project")
    with pytest.raises(PlaceTakenError, match=r"README\.md is not the page .*--results"):
        TEXT.refuse_foreign_results(tmp_path)


def test_two_writers_of_one_file_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "answer.json"
    replace: Callable[..., None] = os.replace

    def interleaved(source: Path, target: Path) -> None:
        monkeypatch.setattr("selfdistill.runlog.os.replace", replace)
        write_atomically(path, "second")  # while the first one is about to be put in place
        replace(source, target)

    monkeypatch.setattr("selfdistill.runlog.os.replace", interleaved)
    write_atomically(path, "first")
    assert contents(tmp_path) == {"answer.json": b"first"}
