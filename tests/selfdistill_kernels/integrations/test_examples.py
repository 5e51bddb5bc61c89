"""The scripts of examples/ run as they are written, and learn something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted((ROOT / "examples").glob("kernels_*.py"))
ON_RANKS_ALONE = ("kernels_in_fsdp2", "kernels_in_tensor_parallel")
ALONE = [path for path in SCRIPTS if path.stem not in ON_RANKS_ALONE]
RANKS = [ROOT / f"examples/{name}.py" for name in ("kernels_in_a_loop", *ON_RANKS_ALONE)]


def losses(command: list[str]) -> list[float]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CI": "1",
        "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    # Two ranks may write into one line.
    return [float(found) for found in re.findall(r"(?:loss |'loss': ')(\d\.\d+)", done.stdout)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_at_most_forty_lines(script: Path) -> None:
    assert len(script.read_text().splitlines()) <= 40


@pytest.mark.parametrize("script", ALONE, ids=lambda path: path.stem)
def test_script(script: Path) -> None:
    found = losses([sys.executable, str(script)])
    assert len(found) == 3
    assert max(found) > 0


@pytest.mark.slow
@pytest.mark.parametrize("script", RANKS, ids=lambda path: path.stem)
def test_script_on_two_ranks(script: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    found = losses(
        [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)]
    )
    assert len(found) == 6
    assert max(found) > 0
