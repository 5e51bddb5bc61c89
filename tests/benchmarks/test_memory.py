from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.contender import StepResult
from benchmarks.memory import MEBIBYTE, measure, peak_extra_bytes
from benchmarks.problems import Shape

SHAPE = Shape(256, 16, 16384)
LOGITS = 4 * 256 * 16384  # 16 MiB


@pytest.mark.slow
def test_measure_counts_the_peak_without_what_is_returned():
    # In a process of its own: memory that earlier tests freed may still be resident here.
    program = (
        "import torch\n"
        "from benchmarks.contender import StepResult\n"
        "from benchmarks.memory import measure\n"
        "def step():\n"
        "    kept = torch.ones(64 << 18)\n"
        "    torch.ones(48 << 18)\n"
        "    return StepResult(None, kept, None)\n"
        "print(measure(step, 'cpu'))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert int(run.stdout) / MEBIBYTE == pytest.approx(48, abs=4)


@pytest.mark.slow
def test_a_fresh_process_sees_the_logits_of_materialised_torch():
    """Whatever the resident set of the process that asks: ru_maxrss would start at that."""
    ballast = torch.ones(512 * MEBIBYTE // 4)
    assert peak_extra_bytes("torch", SHAPE, "float32") > 3 * LOGITS
    del ballast


def test_workspace_bounds_ours():
    workspace = 4 * MEBIBYTE
    assert peak_extra_bytes("ours", SHAPE, "float32", workspace=workspace) < 3 * workspace


def test_a_failing_process_says_why():
    with pytest.raises(RuntimeError, match=r"memory of ours at 256/16/16384(.|\n)*workspace: 8"):
        peak_extra_bytes("ours", SHAPE, "float32", workspace=8)


def test_on_a_gpu_the_allocator_tells_the_peak(monkeypatch):
    """Peak less what was there before less what is returned."""
    calls = []
    for name, value in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 1000),
        ("max_memory_allocated", 1000 + 400 + 4 * 25),
    ):
        monkeypatch.setattr(
            torch.cuda, name, lambda name=name, value=value: calls.append(name) or value
        )

    def step():
        calls.append("step")
        return StepResult(None, torch.ones(25), None)

    assert measure(step, "cuda") == 400
    assert calls == [
        "synchronize", "reset_peak_memory_stats", "memory_allocated", "step", "synchronize",
        "max_memory_allocated",
    ]  # fmt: skip
