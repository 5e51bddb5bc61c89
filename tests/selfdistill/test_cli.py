from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import selfdistill.checkout
import selfdistill.training.loop
import studies.arithmetic.demo.run
from selfdistill import cli
from selfdistill.checkout import find_checkout, load_study
from selfdistill.config import load_config
from selfdistill.evaluation.scores import Evaluation
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.training.loop import TrainResult
from selfdistill.training.solver import Solver

ROOT = Path(__file__).resolve().parents[2]
YAML = """
model: {model}
output_dir: {output}
device: cpu
steps: {steps}
prompts_per_step: 1
task: {{name: arithmetic, step_counts: [1]}}
method: {{name: refsol, group_size: 2}}
rollout: {{max_new_tokens: 6}}
evaluation: {{every: 5, problems: 2, samples: 2}}
"""


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run the command line as its entry point does; return the exit status."""
    monkeypatch.setattr(sys, "argv", ["selfdistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def write_config(folder: Path, solver_dir: Path, *, steps: int = 1) -> Path:
    path = folder / "run.yaml"
    path.write_text(YAML.format(model=solver_dir, output=folder / "run", steps=steps))
    return path


def test_train_then_resume_then_evaluate(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "train", write_config(tmp_path, solver_dir)) == 0
    said = capsys.readouterr().out
    assert "Best held-out Avg@2" in said
    assert cli.UNTRAINED in said.replace("\n", " ")  # a random model is right by no chance
    assert (tmp_path / "run" / "report" / "compare.html").is_file()
    assert run(monkeypatch, "train", write_config(tmp_path, solver_dir)) == 1
    assert "already holds a run" in capsys.readouterr().err
    config = write_config(tmp_path, solver_dir, steps=2)
    assert run(monkeypatch, "train", config, "--resume") == 0
    assert "Resuming after step 1 of 2" in capsys.readouterr().out

    report = tmp_path / "result.json"
    options = ["--problems", "3", "--samples", "2", "--output", str(report)]
    assert run(monkeypatch, "evaluate", tmp_path / "run", *options) == 0
    said = capsys.readouterr().out
    assert "Avg@2" in said
    assert cli.UNTRAINED in said.replace("\n", " ")
    assert (
        run(
            monkeypatch,
            "evaluate",
            tmp_path / "run",
            *options,
            "--overwrite",
            "--checkpoint",
            "last",
        )
        == 0
    )
    assert cli.UNTRAINED not in capsys.readouterr().out.replace("\n", " ")
    result = Evaluation.from_json(report.read_text())
    assert (result.split, len(result.problems), result.samples) == ("test", 3, 2)
    options = ["--problems", "1", "--samples", "1", "--split", "dev"]
    assert run(monkeypatch, "evaluate", solver_dir, *options) == 0


def test_evaluations_with_neighbouring_seeds_share_no_stream(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []
    attempt = Solver.attempt

    def watched(self: Solver, *, seed: int, **options: Any) -> list[Attempts]:
        seeds.append(seed)
        return attempt(self, seed=seed, **options)

    monkeypatch.setattr(Solver, "attempt", watched)
    for seed in ("0", "1", "0"):
        options = ["--problems", "1", "--samples", "1", "--seed", seed]
        assert run(monkeypatch, "evaluate", write_config(tmp_path, solver_dir), *options) == 0
    assert seeds[0] == seeds[2]
    assert abs(seeds[0] - seeds[1]) > 10_000  # problem i draws from the seed + i


def test_a_torn_checkpoint_is_not_evaluated(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(monkeypatch, "train", write_config(tmp_path, solver_dir))
    (tmp_path / "run" / "checkpoints" / "best" / "model.safetensors").write_bytes(b"torn")
    assert run(monkeypatch, "evaluate", tmp_path / "run") == 1
    error = capsys.readouterr().err.replace("\n", "")
    assert "error:" in error
    assert "model.safetensors has other bytes" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: m\noutput_dir: o\nstep: 3\n", "step:"), ("[", "not valid YAML")],
)
def test_what_a_user_can_mend_is_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    message: str,
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert run(monkeypatch, "train", tmp_path / "bad.yaml") == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert run(monkeypatch, "train", tmp_path / "absent.yaml") == 1
    assert "absent.yaml" in capsys.readouterr().err


def test_a_programming_error_keeps_its_traceback(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(selfdistill.training.loop, "train", broken)
    monkeypatch.setattr(
        sys, "argv", ["selfdistill", "train", str(write_config(tmp_path, solver_dir))]
    )
    with pytest.raises(KeyError, match="bug"):
        cli.main()


def test_an_interrupted_run_has_a_status_of_its_own(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stopped = TrainResult(step=1, interrupted=True, best_step=0, best_metric=0.0)
    monkeypatch.setattr(selfdistill.training.loop, "train", lambda *args, **kwargs: stopped)
    assert run(monkeypatch, "train", write_config(tmp_path, solver_dir)) == 130
    assert "go on with --resume" in capsys.readouterr().out
    monkeypatch.setattr(studies.arithmetic.demo.run, "demo", lambda *args, **kwargs: None)
    assert run(monkeypatch, "demo") == 130


@pytest.mark.parametrize("command", ["demo", "reproduce"])
def test_a_study_says_where_it_is_looked_for(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed = tmp_path / "site-packages" / "selfdistill" / "checkout.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selfdistill.checkout, "__file__", str(installed))
    assert run(monkeypatch, command) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error: studies/arithmetic/ and examples/arithmetic/ are neither in ")
    assert str(tmp_path / "site-packages") in error
    assert "in a clone" in error


def test_the_study_of_a_clone_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages" / "selfdistill" / "checkout.py"
    monkeypatch.setattr(selfdistill.checkout, "__file__", str(installed))
    monkeypatch.chdir(ROOT)
    assert find_checkout() == ROOT
    assert load_study("demo.run") is studies.arithmetic.demo.run


def test_training_loads_what_it_needs_and_no_more(solver_dir: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path, solver_dir)
    # The page is made when the run is over, by a room of its own.
    path.write_text(path.read_text() + "report: false\ncompletions: null\n")
    code = (
        f"import sys; sys.argv = ['selfdistill', 'train', {str(path)!r}]\n"
        "from selfdistill.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.splitlines()[-1].split()
    assert "selfdistill.training.loop" in loaded
    other_rooms = ("analysis", "export", "filtering", "planning", "prediction")
    not_chosen = (
        *("config.messages", "critic.", "methods.grpo", "methods.stepalign", "rollout.vllm_"),
        *("methods.policy_gradient", "methods.rewarded", "methods.wrong_step"),
        "methods.contrast",
        "methods.position_weights",
        "methods.selection",
        *("model.adapters", "model.following_teacher", "model.sharding", "tasks.arithmetic.noise"),
        *("model.attention.flash", "model.attention.flex", "tasks.dataset"),
        *("training.agreement", "training.rank_failures", "training.completions"),
        *(
            "training.overlap",
            "training.trackers",
            "config.overrides",
            "prompts.templates",
            "tasks.python_task",
        ),
    )
    unwanted = tuple(f"selfdistill.{name}" for name in (*other_rooms, *not_chosen))
    # What a critic is, every method knows.
    found = {name for name in loaded if name.startswith((*unwanted, "studies", "peft"))}
    assert found - {"selfdistill.critic.interface"} == set()


def test_settings_of_the_command_line_and_the_version(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, solver_dir, steps=3)
    options = ["steps=2", "evaluation.patience=1", "evaluation.every=1"]
    assert run(monkeypatch, "train", config, *options) == 0
    assert "Ended after step 1: evaluation.patience is used up" in capsys.readouterr().out
    assert run(monkeypatch, "train", config, "stpes=2") == 1
    assert "did you mean steps?" in capsys.readouterr().err.replace("\n", " ")
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("selfdistill")


def test_the_shipped_demo_configuration_is_valid() -> None:
    config = load_config(ROOT / "examples" / "arithmetic" / "demo.yaml")
    assert config.method.name == "stepalign"
    assert config.method.teacher.name == "base"


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['selfdistill', '--help']\n"
        "from selfdistill.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("False\n")
    for command in ("train", "evaluate", "analyze", "compare", "demo"):
        assert command in result.stdout
    module = subprocess.run(
        [sys.executable, "-m", "selfdistill", "--help"], capture_output=True, text=True, check=True
    )
    assert "evaluate" in module.stdout


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tokens", "64", "--hidden", "32", "--vocabulary", "512", "--dtype", "float32"]
    assert run(monkeypatch, "doctor", *options, "--device", "cpu", "--frozen") == 0
    printed = capsys.readouterr().out
    assert (
        "What would run for 64 tokens, hidden 32, vocabulary 512, float32 on cpu, frozen head"
        in printed
    )
    assert "backend native" in printed
    monkeypatch.setattr("selfdistill_kernels.tools.doctor.run", lambda **options: 1)
    assert run(monkeypatch, "doctor", "--gpu") == 1


def test_a_dry_run_trains_nothing(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "train", write_config(tmp_path, solver_dir), "--dry-run") == 0
    assert "[shared prefix, " in capsys.readouterr().out
    # Nor does one that was forgotten, where the critic was to be asked.
    assert run(monkeypatch, "train", tmp_path / "run.yaml", "--ask-critic") == 2
    assert "it belongs to --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_predict_prints_tables_or_json_and_trains_nothing(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, solver_dir)
    assert run(monkeypatch, "predict", config, "--attempts", "4") == 0
    out = capsys.readouterr().out
    for phrase in ("Forecast after 1 steps", "Begin with: neither.", "A step should take"):
        assert phrase in out
    options = ["--attempts", "4", "--methods", "refsol,stepalign", "--json"]
    assert run(monkeypatch, "predict", config, "steps=3", *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 3
    assert [c["label"] for c in found["probe"]["contexts"]] == ["refsol", "stepalign"]
    assert not (tmp_path / "run").exists()


def test_show_and_export(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, solver_dir)
    assert run(monkeypatch, "train", config, "report=false") == 0
    assert not (tmp_path / "run" / "report").exists()
    assert run(monkeypatch, "show", tmp_path / "run", "--rollouts", "1") == 0
    assert "rollout 0: reward 0, wrong" in capsys.readouterr().out
    capsys.readouterr()
    assert (
        run(
            monkeypatch,
            "export",
            tmp_path / "run",
            "--output",
            tmp_path / "model",
            "--checkpoint",
            "last",
        )
        == 0
    )
    said = capsys.readouterr().out.replace("\n", " ")
    assert "The model is in" in said
    assert said.strip().endswith("with the weights after step 1.")
    assert run(monkeypatch, "export", tmp_path / "run", "--output", tmp_path / "best") == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"with the weights after step 0. {cli.UNTRAINED}" in said
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_filter_writes_a_file_and_a_table(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_config(tmp_path, solver_dir)
    config.write_text(config.read_text().replace("refsol", "stepalign"))
    options = ["--output", tmp_path / "hard.jsonl", "--samples", "2", "--problems", "2"]
    assert run(monkeypatch, "filter", config, *options, "--split", "dev", "--below", "1/2") == 0
    out = capsys.readouterr().out
    assert "2 problems: 2 kept, 0 too easy" in out
    assert len((tmp_path / "hard.jsonl").read_text().splitlines()) == 2
    assert run(monkeypatch, "filter", config, *options, "--below", "half") == 2
    assert run(monkeypatch, "filter", config, *options, "--below", "1/4") == 1
    assert "another below, split" in capsys.readouterr().err.replace("\n", " ")


def test_a_yaml_file_is_evaluated_before_training(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "result.json"
    options = ["--problems", "2", "--samples", "1", "--output", report]
    config = write_config(tmp_path, solver_dir)
    assert run(monkeypatch, "evaluate", config, *options) == 0
    task = ArithmeticTask(step_counts=(1,))  # the file's, not the default
    ids = [problem.id for problem in task.problems(split="test", count=2)]
    scores = Evaluation.from_json(report.read_text()).problems
    assert [score.problem_id for score in scores] == ids
