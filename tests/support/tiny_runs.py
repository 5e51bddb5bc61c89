"""What a finished run left behind, for comparing two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfdistill.runlog import JsonLines

ROOT = Path(__file__).resolve().parents[2]
# Differs between any two runs.
VOLATILE = {"seconds", "peak_rss_mib"}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the run's last checkpoint: weights, optimiser, teacher, RNG."""
    return {
        f"{path.name}/{key}": tensor
        for path in (run / "checkpoints" / "last").glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }


def lines(run: Path, log: str) -> list[dict[str, Any]]:
    """Return a log without what differs between any two runs."""
    records = JsonLines(run / log).read()
    return [{k: v for k, v in record.items() if k not in VOLATILE} for record in records]


def assert_same_run(one: Path, other: Path) -> None:
    """Compare two runs bit for bit."""
    expected, got = tensors(one), tensors(other)
    assert expected.keys() == got.keys()
    different = [name for name in expected if not torch.equal(expected[name], got[name])]
    assert not different
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(one, log) == lines(other, log)


def forked_runs(action: str, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Ask `forked_runs.py`."""
    path = folder / f"{action}.json"
    path.write_text(json.dumps(request, default=str))
    script = Path(__file__).with_name("forked_runs.py")
    result = subprocess.run(
        [sys.executable, str(script), action, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def ranks_settings(solver_dir: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """A short run for several processes."""
    return {
        "model": str(solver_dir),
        "output_dir": str(output_dir),
        "task": {"step_counts": [1, 2]},
        "method": {"name": "stepalign", "group_size": 2},
        "device": "cpu",
        "steps": 3,
        "prompts_per_step": 3,
        "rollout": {"max_new_tokens": 6},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "evaluation": {"every": 2, "problems": 3, "samples": 2},
        "max_empty_steps": None,  # a random model earns no reward
        **changes,
    }


def assert_close_runs(alone: Path, together: Path) -> None:
    """Compare two runs up to rounding."""
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        expected, got = lines(alone, log), lines(together, log)
        assert len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                if isinstance(value, float):
                    # An advantage is a difference of log-probs of a few nats, rounded to 2e-7.
                    absolute = 1e-7 if name == "advantage" else 1e-9
                    assert other[name] == pytest.approx(value, rel=1e-5, abs=absolute), name
                else:
                    assert other[name] == value, name
    expected_tensors, got_tensors = tensors(alone), tensors(together)
    assert expected_tensors.keys() == got_tensors.keys()
    for name, tensor in expected_tensors.items():
        if name.startswith("rng"):
            continue  # of the process at large; a run draws from generators of its own
        error = (got_tensors[name].double() - tensor.double()).norm()
        # AdamW divides by the gradient's size: elements whose gradient is noise move at random.
        # An adapter is all movement (its B starts at 0), other weights hardly move.
        tolerance = 1e-6 if name.startswith("model") else 1e-5
        assert error <= tolerance * tensor.double().norm() + 1e-12, name
