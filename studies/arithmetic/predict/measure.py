"""What the fit needs: the runs of this study, and a probe of every condition; both are kept."""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from torch import nn
from transformers.utils import logging as transformers_logging

from selfdistill.config import Distillation
from selfdistill.prediction.probe import Probe, probe
from selfdistill.rollout.engine import Rollout, RolloutEngine, SamplingParams
from selfdistill.runlog import write_atomically
from selfdistill.training.loop import train
from selfdistill.training.solver import load_solver
from studies.arithmetic.predict.conditions import AFTERWARDS, OWN, STUDY, Condition

# The law is fitted to large probes, so that chance bends it less. Conditions that are kept out are
# probed as a user would do it, with other problems and other random numbers.
FIT_ATTEMPTS, KEPT_OUT_ATTEMPTS = 1024, 256
KEPT_OUT_SEED = 1


@dataclass(frozen=True)
class Timed:
    """Seconds that a run or a probe took: of the clock, and of the processor."""

    wall: float
    cpu: float


def train_all(output: Path, model: str, console: Console) -> bool:
    """Train what is left of this study's own conditions.

    Returns:
        False when an interrupt stopped it; the same call goes on from there.
    """
    transformers_logging.disable_progress_bar()
    for condition in (*OWN, *AFTERWARDS):
        folder = output / "runs" / condition.name
        if (folder / "done.json").exists():
            continue
        console.print(f"training {condition.name}")
        wall, cpu = time.perf_counter(), time.process_time()
        config = condition.config(model, folder)
        if train(config, resume=True, console=Console(file=StringIO())).interrupted:
            return False
        spent = Timed(time.perf_counter() - wall, time.process_time() - cpu)
        write_atomically(folder / "done.json", TypeAdapter(Timed).dump_json(spent).decode())
    return True


def is_trained(output: Path, condition: Condition) -> bool:
    """Tell whether a condition's run is finished."""
    return (output / "runs" / condition.name / "done.json").exists()


def probe_all(output: Path, model: str, console: Console) -> None:
    """Probe what has not been probed; contexts of the same problems share the attempts."""
    remembered: dict[Hashable, list[list[Rollout]]] = {}
    for condition in (*STUDY, *OWN, *AFTERWARDS):
        path = probe_file(output, condition)
        if path.exists():
            continue
        console.print(f"probing {path.stem}")
        seed, attempts = (
            (KEPT_OUT_SEED, KEPT_OUT_ATTEMPTS) if condition.kept_out else (0, FIT_ATTEMPTS)
        )
        config = replace(condition, seed=seed).config(model, output / "never-trained")
        solver = load_solver(config)
        solver = replace(solver, engine=Remembering(solver.engine, remembered))
        method = config.method
        wanted = [(method.name, method)] if isinstance(method, Distillation) else []
        cpu = time.process_time()
        found = TypeAdapter(Probe).dump_python(
            probe(config, wanted, attempts=attempts, solver=solver), mode="json"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"cpu": time.process_time() - cpu, "probe": found}))


class Remembering:
    """An engine that answers the same question from memory (implements `RolloutEngine`).

    Args:
        engine: samples what was not asked before.
        answers: the memory, which engines with the same weights may share.
    """

    def __init__(self, engine: RolloutEngine, answers: dict[Hashable, list[list[Rollout]]]) -> None:
        self.engine = engine
        self.answers = answers

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        """See `RolloutEngine.generate`."""
        question = (tuple(map(tuple, prompts)), group_size, params)
        if question not in self.answers:
            self.answers[question] = self.engine.generate(
                prompts, group_size=group_size, params=params
            )
        return self.answers[question]

    def sync(self, model: nn.Module) -> None:
        """Forget everything: the weights are others now."""
        self.answers.clear()
        self.engine.sync(model)

    def wait_for_group(self) -> None:
        """See `RolloutEngine.wait_for_group`."""
        self.engine.wait_for_group()


def read_probe(output: Path, condition: Condition) -> Probe:
    """Return the probe of a condition; those that differ in the budget alone share one."""
    text = json.loads(probe_file(output, condition).read_text("utf-8"))
    return TypeAdapter(Probe).validate_python(text["probe"])


def probe_file(output: Path, condition: Condition) -> Path:
    """Return where a condition's probe lies."""
    kept_out = "-kept-out" if condition.kept_out else ""
    return output / "probes" / f"{condition.probe_name}{kept_out}.json"
