"""The kernel as the hub's loader loads it, beside the package itself: needs a package index."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernel_hub.layout import ROOT, write_sources
from kernel_hub.variant import build_variant

pytestmark = pytest.mark.slow

# A RuntimeWarning would say that the reference backend runs instead of the native one.
LOAD = """
import sys, warnings
from pathlib import Path

warnings.simplefilter("error", RuntimeWarning)
import torch
from kernels import get_loaded_kernels, get_local_kernel
from kernels._rust import Build, Digest, DigestAlgorithm

folder = Path(sys.argv[1])
Build.open(folder)  # kernel-builder's own reader of build.toml
losses = get_local_kernel(folder, backend="cpu")
assert not any(name.startswith("selfdistill") for name in sys.modules), "it imports the package"
(loaded,) = get_loaded_kernels()
loaded.metadata.digest.validate(
    Digest.hash_variant(DigestAlgorithm.SHA256, Path(losses.__file__).parent)
)
"""
COMPARE = """
import selfdistill_kernels as package

torch.manual_seed(0)
targets = torch.arange(40)
for dtype in (torch.float32, torch.bfloat16):
    student, teacher, head = (
        torch.randn(size, 32).to(dtype) for size in (40, 40, 300)
    )
    results = []
    for module in (losses, package):
        hidden, weight = (tensor.clone().requires_grad_() for tensor in (student, head))
        for backend in ("auto", "native"):
            out = module.fused_linear_distillation(
                hidden, teacher, weight, targets, backend=backend,
                objective=module.Objective("jsd", cross_entropy=0.5),
                advantage_mask=module.AdvantageMask(0.1),
            )
            out.loss.backward()
        results.append((out.loss, out.advantage, out.active, hidden.grad, weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), dtype
compiled = torch.compile(
    lambda hidden: losses.fused_linear_distillation(hidden, student, head).loss,
    fullgraph=True, backend="aot_eager",
)
assert torch.isfinite(compiled(student))
"""


def run(script: str, kernel: Path, loader: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{loader}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", script, str(kernel)], cwd=kernel, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_kernel(tmp_path: Path) -> None:
    """It has the package's numbers beside the package, and no slow path where its operators are
    missing. One test, because the build takes a minute."""
    kernel, loader = tmp_path / "kernel", tmp_path / "loader"
    write_sources(kernel)
    variant = build_variant(kernel, tmp_path / "objects")
    # In a folder of its own: nothing else of the environment is to see it.
    requirements = ROOT / "requirements-kernel-hub.txt"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(loader)]
    subprocess.run([*command, "--requirement", str(requirements)], check=True)

    done = run(LOAD + COMPARE, kernel, loader)
    assert done.returncode == 0, done.stderr

    (operators,) = variant.glob("*.so")
    operators.unlink()
    done = run(LOAD, kernel, loader)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
