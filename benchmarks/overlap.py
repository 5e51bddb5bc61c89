"""How long a step takes when a server draws the rollouts of the next one while it trains.

    python -m benchmarks.overlap [--steps N]

A run of a small random model (LoRA, RefSol) samples with one server of vLLM, which has a core to
itself, and trains on another core: first one after the other (`max_staleness: 0`), which tells how
long rollouts and training take alone, then at the same time (`max_staleness: 1`). Needs vLLM, as in
requirements-vllm.txt, and two cores. Prints medians over the steps, without the first two.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from selfdistill.config import Config
from selfdistill.runlog import JsonLines
from selfdistill.training.loop import train

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from vllm_models import VLLMServer, save, tiny  # type: ignore[import-not-found]

# What a step does while nothing is drawn ahead, beside the rollouts.
_NOT_TRAINING = ("rollout", "evaluate")


def step_seconds(settings: dict[str, Any], staleness: int) -> list[dict[str, float]]:
    """Train, and return what each step spent on what."""
    engine = {**settings["rollout"]["engine"], "max_staleness": staleness}
    rollout = {**settings["rollout"], "engine": engine}
    folder = Path(settings["output_dir"], str(staleness))
    config = Config.model_validate({**settings, "rollout": rollout, "output_dir": folder})
    train(config, console=Console(quiet=True))
    records = JsonLines(folder / "metrics.jsonl").read()
    # The last one draws nothing ahead.
    return [record["seconds"] for record in records[2:-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=48)
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("needs two cores")
    with tempfile.TemporaryDirectory() as folder:
        model = save(tiny(tied=True, seed=0, layers=6, hidden=384), Path(folder, "model"))
        server = VLLMServer(model, Path(folder, "log"), core=cores[1])
        try:
            server.wait()
            os.sched_setaffinity(0, {cores[0]})
            torch.set_num_threads(1)
            settings = {
                "model": model,
                "output_dir": folder,
                "device": "cpu",
                "task": {"step_counts": [2]},
                "adapter": {"r": 8},
                "method": {"name": "refsol", "group_size": 8, "loss": {"importance_clip": 2}},
                "steps": arguments.steps,
                "prompts_per_step": 8,
                "rollout": {
                    "max_new_tokens": arguments.new_tokens,
                    "engine": {
                        "name": "vllm_server", "base_urls": [server.url], "dtype": "float32",
                        "tolerance": 1e-2,  # weights of a size that trained ones do not have
                    },
                },
                "checkpoint": {"every": 1000},
                "evaluation": {"every": 1000, "problems": 1, "samples": 1},
                "max_empty_steps": None,
            }  # fmt: skip
            alone, together = step_seconds(settings, 0), step_seconds(settings, 1)
        finally:
            server.kill()
    drawing = median(step["rollout"] for step in alone)
    training = median(
        sum(seconds for what, seconds in step.items() if what not in _NOT_TRAINING)
        for step in alone
    )
    whole = median(sum(step.values()) for step in together)
    waiting = median(step["wait"] for step in together)
    for name, steps in (("0", alone), ("1", together)):
        parts = {what: median(step[what] for step in steps) for what in steps[0]}
        print(f"max_staleness {name}:", *(f"{k} {v:.3f}" for k, v in parts.items()))
    print(f"rollouts alone {drawing:.3f} s, training alone {training:.3f} s")
    print(f"one after the other {drawing + training:.3f} s a step")
    print(
        f"at the same time {whole:.3f} s a step (waiting for rollouts {waiting:.3f} s), "
        f"{whole / max(drawing, training):.2f} of the longer one"
    )


if __name__ == "__main__":
    main()
