"""What the emulation sees: accesses out of bounds and results that depend on threads' order."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cuda_build import ROOT, build_driver

SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
SEEDS = (None, 1, 2)


def run(driver: Path, seed: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0")
    if seed is not None:
        environment["SELFDISTILL_EMULATION_SEED"] = str(seed)
    return subprocess.run(
        [str(driver)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def hashes(driver: Path) -> set[str]:
    done = [run(driver, seed) for seed in SEEDS]
    assert all(d.returncode == 0 for d in done), done[0].stderr
    return {d.stdout for d in done}


def changed_sources(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc with one text replaced."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    code = (csrc / "cuda" / file).read_text()
    assert code.count(old) == 1
    (csrc / "cuda" / file).write_text(code.replace(old, new))
    return csrc


@pytest.mark.slow
def test_no_access_out_of_bounds(tmp_path):
    done = run(build_driver(tmp_path, SANITIZE))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_an_access_out_of_bounds_is_seen(tmp_path):
    csrc = changed_sources(
        tmp_path, "row.cuh", "if (is_aligned && j + 4 <= columns) return", "if (is_aligned) return"
    )
    done = run(build_driver(tmp_path, SANITIZE, csrc))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_the_order_of_threads_does_not_matter(tmp_path):
    assert len(hashes(build_driver(tmp_path))) == 1


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        # The bfloat16 gradient then overwrites scores that others have yet to read.
        pytest.param(
            "gradient.cuh",
            "if constexpr (kShrinks) __syncthreads();",
            "",
            marks=pytest.mark.slow,  # compiles as long as all the others
            id="gradient",
        ),
        # The target of a hole may then be read before it is known.
        pytest.param(
            "gather.cu",
            "    seen += active[r];\n  }\n  __syncthreads();",
            "    seen += active[r];\n  }",
            id="gather",
        ),
    ],
)
def test_a_missing_barrier_is_seen(tmp_path, file, old, new):
    assert len(hashes(build_driver(tmp_path, csrc=changed_sources(tmp_path, file, old, new)))) > 1
