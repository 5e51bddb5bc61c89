"""An extension of another torch is refused by name before it is loaded."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfdistill_kernels.backends.native import extension
from selfdistill_kernels.backends.native.extension import BuiltFor, mismatch, read_record


def library(folder: Path, record: str, name: str = "_C.abi3.so") -> Path:
    """A file with a record among other bytes."""
    file = folder / name
    file.write_bytes(b"\x7fELF\0\xff" + record.encode() + b"\0GCC: (Debian)\0")
    return file


def built_for(version: str, cuda: str = "None") -> str:
    return f"selfdistill_kernels was built for torch={version} cuda={cuda}"


@pytest.mark.parametrize(
    ("built", "running", "fits"),
    [
        ("2.13.0+cpu", "2.13.0+cpu", True),
        ("2.13.0", "2.13.0+cu130", True),  # one release has one interface
        ("2.13.0+cpu", "2.13.0+cu130", True),
        ("2.13.0", "2.13.1", False),
        ("2.11.0+cu130", "2.13.0+cpu", False),
        ("2.13.0", "2.14.0a0+git123", False),
        ("2.14.0a0+git123", "2.14.0a0+git456", False),  # two commits between releases
        ("2.14.0a0+git123", "2.14.0a0+git123", True),
    ],
)
def test_torch_is_compared(tmp_path, monkeypatch, built, running, fits):
    file = library(tmp_path, built_for(built))
    assert read_record(file) == BuiltFor(built, None)
    monkeypatch.setattr(torch, "__version__", running)
    expected = f"_C.abi3.so was built for torch {built}, and this is torch {running}"
    assert mismatch(file) == (None if fits else expected)


@pytest.mark.parametrize(
    ("built", "running", "fits"), [("13.0", "13.2", True), ("12.8", "13.0", False)]
)
def test_cuda_is_compared_for_the_cuda_rows(tmp_path, monkeypatch, built, running, fits):
    monkeypatch.setattr(torch.version, "cuda", running)
    record = built_for(torch.__version__, built)
    file = library(tmp_path, record, "_cuda.abi3.so")
    assert read_record(file) == BuiltFor(torch.__version__, built)
    expected = f"_cuda.abi3.so was built for CUDA {built}, and this torch for CUDA {running}"
    assert mismatch(file) == (None if fits else expected)
    assert mismatch(library(tmp_path, record)) is None  # the CPU's rows use no CUDA


def test_without_a_record_nothing_is_loaded(tmp_path):
    file = library(tmp_path, "built by an earlier setup.py")
    assert mismatch(file) == f"{file} does not say which torch it was built for"
    file.write_bytes(b"")
    assert read_record(file) is None


def test_the_extension_of_this_process_carries_its_record():
    spec = importlib.util.find_spec("selfdistill_kernels._C")
    assert spec is not None
    assert spec.origin is not None
    built = read_record(Path(spec.origin))
    assert built is not None
    assert built.torch.partition("+")[0] == torch.__version__.partition("+")[0]


def test_a_file_that_is_no_library_is_no_crash(tmp_path, monkeypatch):
    """The record fits, and the rest of the file does not."""
    file = library(tmp_path, built_for(torch.__version__))
    spec = importlib.util.spec_from_file_location("selfdistill_kernels._D", file)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    problem = extension.load("_D", missing="install a C++ compiler")
    assert problem is not None
    assert problem.startswith("the compiled extension _D cannot be loaded (")
    assert problem.endswith(extension.REBUILD)


WITH_ANOTHER_TORCH = """
import sys, warnings
import torch
torch.__version__ = "2.99.0+cpu"
import selfdistill_kernels
from selfdistill_kernels.backends.native.extension import REBUILD
from selfdistill_kernels.tools.doctor import main

assert "selfdistill_kernels._C" not in sys.modules
assert not hasattr(torch.ops.selfdistill, "row_visit_")
hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        loss = selfdistill_kernels.fused_linear_distillation(hidden, hidden.detach() + 1, weight)
        loss.loss.backward()
messages = [str(w.message) for w in caught]
assert len(messages) == 1, messages
assert "using the reference backend" in messages[0], messages
said = messages[0].split("native: ")[1]
assert " was built for torch 2." in said and "and this is torch 2.99.0+cpu; run" in said, said
assert said.endswith(REBUILD), said
assert main(["--device", "cpu", "--dtype", "float32"]) == 0
print("SAID", said)
"""


def test_with_another_torch_the_reference_works_and_says_so_once():
    run = subprocess.run(
        [sys.executable, "-c", WITH_ANOTHER_TORCH], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    doctor, said = run.stdout.split("SAID ")
    assert f"native on cpu    missing: {said.strip()}" in doctor


def test_no_remedy_names_a_package_index():
    """The project is on none: whoever registered its name there would be installed."""
    root = Path(extension.__file__).parents[3]
    folders = ("benchmarks", "docs", "examples", "kernel_hub", "selfdistill*", "studies")
    files = [
        *root.glob("*.*"),
        *(file for folder in folders for file in root.glob(f"{folder}/**/*")),
    ]
    for file in files:
        if file.suffix in (".py", ".md", ".yaml", ".txt"):
            text = file.read_text()
            named = re.search(r"pip install(\s+-\S+)*\s+['\"]?selfdistill", text)
            assert named is None, f"{file}: {named}"
            # A remedy that is put together from a package's name.
            assert '"selfdistill[' not in text, file
