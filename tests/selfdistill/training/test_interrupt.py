from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import selfdistill.training.gradients
from selfdistill.config import Config
from selfdistill.model.scoring import score
from selfdistill.training.interrupt import Interrupt, deferred_interrupt
from selfdistill.training.loop import train
from selfdistill.training.solver import Solver


@pytest.mark.parametrize(
    ("interrupt", "said"),
    [
        (
            Interrupt(step=7, saved=6),
            "Stopping when step 7 is finished and saved; once more to stop at once, which leaves "
            "the checkpoint of step 6.",
        ),
        (
            Interrupt(step=7, saved=None, launched=True),
            "Stopping when step 7 is finished and saved, if the launcher waits so long (torchrun: "
            "30 seconds); once more to stop at once, which leaves no checkpoint.",
        ),
        (
            Interrupt(doing="evaluation", step=0, saved=None),
            "Giving up the evaluation after step 0 unless it is about to end; once more to stop at "
            "once, which leaves no checkpoint.",
        ),
        (
            Interrupt(doing="evaluation", step=5, saved=5),
            "Giving up the evaluation after step 5 unless it is about to end; once more to stop at "
            "once, which leaves the checkpoint of step 5.",
        ),
        (
            Interrupt(doing="evaluation", step=5, saved=4),
            "Giving up the evaluation after step 5 unless it is about to end, then saving that "
            "step; once more to stop at once, which leaves the checkpoint of step 4.",
        ),
    ],
)
def test_nothing_is_promised_that_is_not_kept(interrupt: Interrupt, said: str) -> None:
    assert interrupt.answer() == said


def make_config(solver: Path, output: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "model": str(solver),
        "output_dir": output,
        "task": {"step_counts": [1]},
        "method": {"name": "refsol", "group_size": 1},
        "device": "cpu",
        "steps": 3,
        "prompts_per_step": 1,
        "rollout": {"max_new_tokens": 3},
        # More problems than are sampled at once.
        "evaluation": {"every": 9, "problems": 17, "samples": 1},
    }
    return Config.model_validate({**settings, **changes})


def ctrl_c(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def run(config: Config) -> str:
    console = Console(file=io.StringIO(), width=1000)
    assert train(config, console=console).interrupted
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def saved(config: Config) -> list[str]:
    return sorted(path.name for path in (config.output_dir / "checkpoints").glob("step-*"))


def test_in_a_step(solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        ctrl_c()
        return score(*args, **kwargs)

    monkeypatch.setattr(selfdistill.training.gradients, "score", interrupted)
    config = make_config(solver_dir, tmp_path / "run")
    text = run(config)
    assert "Stopping when step 1 is finished and saved; once more" in text
    assert "which leaves the checkpoint of step 0." in text
    assert saved(config) == ["step-000000", "step-000001"]


def test_in_the_first_evaluation(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Solver.attempt

    def interrupted(self: Solver, **options: Any) -> Any:
        ctrl_c()
        return attempt(self, **options)

    monkeypatch.setattr(Solver, "attempt", interrupted)
    config = make_config(solver_dir, tmp_path / "run")
    text = run(config)
    assert "Giving up the evaluation after step 0" in text
    assert "which leaves no checkpoint." in text
    assert saved(config) == []


def test_brackets_of_a_message_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=1000)
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt(console) as interrupt:
        ctrl_c()
        assert interrupt.requested
        # The second one acts as usual.
        assert signal.getsignal(signal.SIGINT) is before
