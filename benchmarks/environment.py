"""What a number depends on besides the code: machine, versions, threads, load."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from selfdistill_kernels import backends

PACKAGES = ("torch", "trl", "liger-kernel", "transformers", "numpy")
GPU_PACKAGES = ("triton", "cut-cross-entropy", "quack-kernels")


def environment(device: str) -> dict[str, Any]:
    """A flat record for JSON and for the head of the tables."""
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "revision": revision(),
    } | {name: package_version(name) for name in PACKAGES}
    return record | gpu_facts() if device == "cuda" else record


def gpu_facts() -> dict[str, Any]:
    """What a time on a GPU depends on, and which of our backends are there."""
    properties, here = torch.cuda.get_device_properties(), backends.found()
    return {
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "processors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / (1 << 30), 1),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "backend triton": here.missing("triton", "cuda") or "available",
        "backend native": here.missing("native", "cuda") or "available",
    } | {name: package_version(name) for name in GPU_PACKAGES}


def cpu_model() -> str:
    """As the kernel names it, else as Python does."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def revision() -> str:
    """The commit of this checkout, with a mark when files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+changes"]
    try:
        run = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()
