"""What the fit needs: the runs of this study, and a probe of every condition; both are kept."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from transformers.utils import logging as transformers_logging

from selfdistill.config import Distillation
from selfdistill.prediction.probe import Probe, probe
from selfdistill.runlog import write_atomically
from selfdistill.training.loop import train
from studies.arithmetic.predict.conditions import OWN, STUDY, Condition

# Conditions that are kept out are probed with other problems and other random numbers.
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
    for condition in OWN:
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
    """Probe what has not been probed."""
    for condition in (*STUDY, *OWN):
        path = probe_file(output, condition)
        if path.exists():
            continue
        console.print(f"probing {path.stem}")
        seed = KEPT_OUT_SEED if condition.kept_out else 0
        config = replace(condition, seed=seed).config(model, output / "never-trained")
        method = config.method
        wanted = [(method.name, method)] if isinstance(method, Distillation) else []
        cpu = time.process_time()
        found = TypeAdapter(Probe).dump_python(probe(config, wanted), mode="json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"cpu": time.process_time() - cpu, "probe": found}))


def read_probe(output: Path, condition: Condition) -> Probe:
    """Return the probe of a condition; those that differ in the budget alone share one."""
    text = json.loads(probe_file(output, condition).read_text("utf-8"))
    return TypeAdapter(Probe).validate_python(text["probe"])


def probe_file(output: Path, condition: Condition) -> Path:
    """Return where a condition's probe lies."""
    kept_out = "-kept-out" if condition.kept_out else ""
    return output / "probes" / f"{condition.probe_name}{kept_out}.json"
