"""Checkpoints that are not those of the configuration, the base model or the data at hand."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tiny_solvers import write_solver
from typer.testing import CliRunner

from selfdistill.cli import app
from selfdistill.config import Config
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.training.loop import train
from selfdistill.training.state_file import CheckpointError

LORA = {"r": 2, "alpha": 4}
QUIET = Console(file=io.StringIO())


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


def refused(command: str, run: Path, *options: str) -> str:
    """Run a command that must fail; return what it said."""
    few = [] if command == "compare" else ["--problems", "1", "--samples", "1"]
    few += ["--attempts", "1"] if command == "analyze" else []
    output = run.parent / f"out-{command}"
    result = CliRunner().invoke(
        app, [command, str(run), *few, "--output", str(output), "--overwrite", *options]
    )
    assert isinstance(result.exception, CheckpointError), result.output
    return str(result.exception)


def edit(run: Path, **changes: Any) -> None:
    path = run / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


COMMANDS = [
    ("evaluate",),
    ("evaluate", "--checkpoint", "last"),
    ("analyze",),
    ("analyze", "--checkpoint", "base"),
    ("compare",),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_edited_configuration_is_not_trusted(
    solver_dir: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    train(make_config(solver_dir, run, adapter=LORA), console=QUIET)
    edit(run, adapter={**LORA, "alpha": 64})
    said = refused(command[0], run, *command[1:])
    assert "belongs to another configuration: adapter ({'r': 2, 'alpha': 4" in said
    assert "'alpha': 64" in said


@pytest.mark.parametrize("command", [c for c in COMMANDS if "base" not in c], ids=" ".join)
def test_a_checkpoint_of_another_run_is_not_taken(
    solver_dir: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    for name, seed in (("run", 0), ("other", 1)):
        train(make_config(solver_dir, tmp_path / name, seed=seed), console=QUIET)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(
        tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints", symlinks=True
    )
    said = refused(command[0], tmp_path / "run", *command[1:])
    assert "another configuration: seed (1 there, 0 here)" in said


@pytest.mark.parametrize(
    ("command", "adapter"),
    [
        (("evaluate",), LORA),
        (("analyze",), LORA),
        (("analyze",), None),
        (("analyze", "--checkpoint", "base"), None),
    ],
    ids=str,
)
def test_another_base_is_refused_where_it_matters(
    solver_dir: Path, tmp_path: Path, command: tuple[str, ...], adapter: dict[str, Any] | None
) -> None:
    run = tmp_path / "run"
    train(make_config(solver_dir, run, adapter=adapter), console=QUIET)
    edit(run, model=str(write_solver(tmp_path / "another", seed=1)))
    assert "started from other weights" in refused(command[0], run, *command[1:])


def test_weights_that_moved_are_found_again(solver_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(make_config(solver_dir, run, adapter=LORA), console=QUIET)
    edit(run, model=str(solver_dir.rename(tmp_path / "moved")))
    few = ["--problems", "1", "--samples", "1"]
    assert CliRunner().invoke(app, ["evaluate", str(run), *few]).exit_code == 0


def change_template(solver: Path) -> None:
    path = solver / "chat_template.jinja"
    path.write_text(path.read_text() + "{# other words #}")


@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_another_chat_template_is_refused(solver_dir: Path, tmp_path: Path, command: str) -> None:
    config = make_config(solver_dir, tmp_path / "run")
    train(config, console=QUIET)
    change_template(solver_dir)
    assert "other tokens or chat template" in refused(command, tmp_path / "run")
    with pytest.raises(CheckpointError, match="other tokens or chat template"):
        train(config, resume=True, console=QUIET)


def with_data(folder: Path) -> dict[str, Any]:
    splits = {}
    for split in ("train", "dev", "test"):
        problems = ArithmeticTask(step_counts=(1,)).problems(split=split, count=3)
        splits[split] = str(folder / f"{split}.jsonl")
        fields = ("question", "answer", "reference")
        lines = [json.dumps({name: getattr(p, name) for name in fields}) for p in problems]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    task = {
        "name": "jsonl",
        "splits": splits,
        "reference": "reference",
        "instruction": "",
        "checker": "plain",
    }
    return {"task": task, "method": {"name": "environment", "group_size": 1}}


def change_first(path: Path, field: str) -> None:
    first, *rest = path.read_text().splitlines()
    path.write_text(
        "\n".join([json.dumps({**json.loads(first), field: f"7777 {path.stem}"}), *rest])
    )


def other_question(path: Path) -> None:
    change_first(path, "question")


def other_answer(path: Path) -> None:
    change_first(path, "answer")


def other_reference(path: Path) -> None:
    change_first(path, "reference")


def one_less(path: Path) -> None:
    path.write_text("\n".join(path.read_text().splitlines()[1:]))


@pytest.mark.parametrize("change", [other_question, other_answer, other_reference, one_less])
@pytest.mark.parametrize(("split", "said"), [("train", "training problems"), ("dev", "dev")])
def test_a_run_does_not_go_on_with_other_data(
    solver_dir: Path, tmp_path: Path, split: str, said: str, change: Callable[[Path], None]
) -> None:
    config = make_config(solver_dir, tmp_path / "run", **with_data(tmp_path))
    train(config, console=QUIET)
    longer = config.model_copy(update={"steps": 2})
    change(tmp_path / "test.jsonl")  # which no run has seen
    assert train(longer, resume=True, console=QUIET).step == 2
    change(tmp_path / f"{split}.jsonl")
    with pytest.raises(CheckpointError, match=rf"trained with other {said}.* than are there now"):
        train(config.model_copy(update={"steps": 3}), resume=True, console=QUIET)
    assert f"trained with other {said}" in refused("evaluate", tmp_path / "run")


def test_a_checkpoint_of_an_older_version_goes_on(solver_dir: Path, tmp_path: Path) -> None:
    config = make_config(solver_dir, tmp_path / "run")
    train(config, console=QUIET)
    path = tmp_path / "run" / "checkpoints" / "last" / "state.json"
    state = json.loads(path.read_text())
    del state["inputs"], state["config"]["max_empty_steps"]
    path.write_text(json.dumps(state))
    assert train(config.model_copy(update={"steps": 2}), resume=True, console=QUIET).step == 2
    assert json.loads(path.resolve().read_text() if path.exists() else "{}") is not None
