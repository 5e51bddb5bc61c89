"""Peak extra memory of one step, measured in a fresh process.

Extra is what a step needs at its peak beyond its inputs and the gradients that it returns. On a CPU
it is read from the peak resident set, VmHWM of Linux. (Not from ru_maxrss, which starts at the
resident set of whoever started the process and so hides anything smaller.) On a GPU it is read from
the allocator's peak.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.contender import StepResult
from benchmarks.peers import contenders
from benchmarks.problems import DTYPES, Shape, make_problem

ROOT = Path(__file__).resolve().parents[1]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MEBIBYTE = 1 << 20
# Freed blocks of this size or more go back to the system at once, so that the resident set before
# a step holds nothing that the step could use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
WARM_UP_SHAPE = Shape(8, 64, 512)


def peak_extra_bytes(
    key: str,
    shape: Shape,
    dtype: str,
    *,
    objective: str = "reverse_kl",
    workspace: str | int = "auto",
    threads: int | None = None,
    device: str = "cpu",
    timeout: float = 3600,
) -> int:
    """Measure one contender of `peers.contenders` in a process of its own.

    Args:
        key: the contender; dtype: a key of DTYPES.
        threads: of torch, None for as many as here.
        timeout: seconds.

    Raises:
        RuntimeError: the process failed; the message holds the end of its error output.
    """
    command = [
        sys.executable, "-m", "benchmarks.memory", key, str(shape), dtype, objective,
        str(workspace), str(threads or torch.get_num_threads()), device,
    ]  # fmt: skip
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=os.environ | MALLOC
    )
    if run.returncode != 0:
        raise RuntimeError(f"memory of {key} at {shape}, {dtype}: {run.stderr[-2000:]}")
    return int(run.stdout.split()[-1])


def measure(step: Callable[[], Iterable[torch.Tensor | None]], device: str) -> int:
    """Bytes that one call needs at its peak beyond what is there before and what it returns."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        # Without the right to reset the peak, that of the set-up remains and can only add.
        with contextlib.suppress(OSError):
            CLEAR.write_text("5")
        before = _status_bytes("VmRSS")
        result = step()
        peak = _status_bytes("VmHWM")
    returned = sum(t.numel() * t.element_size() for t in result if t is not None)
    return max(0, peak - before - returned)


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{STATUS} has no {field}; memory on a CPU is measured on Linux only")
    return int(found[1]) * 1024


def main() -> None:
    """What `peak_extra_bytes` starts; prints the bytes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for name in ("contender", "shape", "dtype", "objective", "workspace", "threads", "device"):
        parser.add_argument(name)
    args = parser.parse_args()
    torch.set_num_threads(int(args.threads))
    workspace = args.workspace if args.workspace == "auto" else int(args.workspace)
    known = contenders(workspace, device=args.device, objective=args.objective)
    contender = known[args.contender]

    def build(shape: Shape) -> Callable[[], StepResult]:
        return contender.build(
            make_problem(shape, DTYPES[args.dtype], device=args.device, objective=args.objective)
        )

    # Libraries load and threads start before the baseline. A compiled step compiles for its shape,
    # which takes more memory than the step: it is warmed up with the step itself.
    build(WARM_UP_SHAPE)()
    step = build(Shape.parse(args.shape))
    if contender.compiled:
        step()
    print(measure(step, args.device))


if __name__ == "__main__":
    main()
