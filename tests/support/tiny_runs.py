"""What a finished run left behind, for comparing two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfdistill.config import Config
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
        timeout=800,  # hangs; a busy machine is slow
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer


def tiny_config(solver_dir: Path, output_dir: Path, **changes: Any) -> Config:
    """A run of seconds on a CPU: two steps of RefSol with one problem each."""
    return Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": output_dir,
            "device": "cpu",
            "task": {"step_counts": [1]},
            "method": {"name": "refsol", "group_size": 2},
            "steps": 2,
            "prompts_per_step": 1,
            "rollout": {"max_new_tokens": 4},
            "evaluation": {"every": 2, "problems": 2, "samples": 1},
            **changes,
        }
    )


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


class SmoothAdamW(torch.optim.AdamW):
    """AdamW without its jump at 0, for runs that are compared up to rounding.

    The usual one moves an element by the learning rate whatever the size of its gradient, up or
    down where the gradient is nothing but rounding. With an epsilon of the gradients' size (they
    are clipped to a norm of 1, of some 10,000 elements) the move is as exact as the gradient.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, eps=1e-2, **options)


# What a gradient, and all that is made of it, may be off by from one run to another, relative to
# its size: four times what one pass of a padded step in plain float32 is off by, which
# tests/selfdistill/model/test_scoring.py measures (up to 5e-6). Between runs, passes are cut and
# summed in another order; a missing, a doubled or another pass changes a gradient by a tenth and
# more.
GRADIENT = 2e-5
# Means over tokens of log-probs, of order 5 each, which float32 rounds by some 1e-6.
NATS = {"loss", "kl", "advantage", "entropy", "engine_disagreement"}


def assert_close_runs(
    alone: Path, together: Path, *, smooth: bool = True, not_compared: Iterable[str] = ()
) -> None:
    """Compare two runs up to rounding.

    Args:
        alone, together: their folders.
        smooth: whether both were runs of SmoothAdamW. Of other runs of one step, two elements of a
            tensor may have gone up in one and down in the other.
        not_compared: names of figures.
    """
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        expected, got = lines(alone, log), lines(together, log)
        assert len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                if name in not_compared:
                    continue
                near = value
                if value is not None and name in NATS:
                    near = pytest.approx(value, rel=GRADIENT, abs=1e-5)
                elif name == "grad_norm":
                    near = pytest.approx(value, rel=GRADIENT)
                assert other[name] == near, name
    moved = sum(line["learning_rate"] for line in lines(alone, "metrics.jsonl"))
    expected_tensors, got_tensors = tensors(alone), tensors(together)
    assert expected_tensors.keys() == got_tensors.keys()
    for name, tensor in expected_tensors.items():
        if name.startswith("rng"):
            continue  # of the process at large; a run draws from generators of its own
        error = (got_tensors[name].double() - tensor.double()).norm()
        size = tensor.double().norm()
        if name.startswith("optimizer"):
            allowed = 2 * GRADIENT * size  # of a gradient, and of its square
        else:
            # An element moves by the learning rate at most; it is rounded at every step.
            steps = moved * tensor.numel() ** 0.5
            allowed = GRADIENT * steps + 4 * torch.finfo(torch.float32).eps * size
            if not smooth:
                allowed += 2 * 2**0.5 * moved
        assert error <= allowed, f"{name}: off by {error:.1e}, allowed {allowed:.1e}"
