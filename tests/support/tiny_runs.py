"""What a finished run left behind, for comparing two of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
