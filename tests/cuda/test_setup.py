"""setup.py builds the CUDA rows where, and only where, it can."""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cuda_build import ROOT
from setuptools import Distribution


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "release", "reason"),
    [
        ("13.0", "/cuda/bin/nvcc", "13.0", None),
        ("13.0", "/cuda/bin/nvcc", "13.2", None),  # one major release is compatible
        (None, "/cuda/bin/nvcc", "13.0", "this torch has no CUDA"),
        ("13.0", None, None, "no nvcc under CUDA_HOME or on PATH; install the CUDA toolkit 13.0"),
        ("13.0", "/cuda/bin/nvcc", "12.8", "but /cuda/bin/nvcc is of release 12.8"),
        ("13.0", "/cuda/bin/nvcc", None, "of release None"),
    ],
)
def test_decision(setup_script, torch_cuda, nvcc, release, reason):
    found = setup_script.cuda_reason(torch_cuda, nvcc, release)
    assert found is None if reason is None else reason in found


def fake_nvcc(folder: Path, release: str) -> Path:
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    return nvcc


def test_nvcc_is_looked_for_where_torch_looks(setup_script, tmp_path):
    home, other = fake_nvcc(tmp_path / "home", "13.0"), fake_nvcc(tmp_path / "other", "12.8")
    path = str(other.parent)
    found = setup_script.find_nvcc({"CUDA_HOME": str(tmp_path / "home"), "PATH": path})
    assert found == str(home)
    assert setup_script.find_nvcc({"PATH": path}) == str(other)
    assert setup_script.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": path}) is None
    assert setup_script.find_nvcc({"PATH": str(tmp_path)}) is None
    assert setup_script.nvcc_release(str(home)) == "13.0"


@pytest.mark.parametrize("torch_cuda", [None, "13.0"])
def test_extensions(setup_script, tmp_path, monkeypatch, torch_cuda):
    """What setup() is given, by what kind of torch is installed; nothing is compiled here."""
    fake_nvcc(tmp_path, "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    extensions, _ = setup_script.native_extensions()
    for extension in extensions:
        assert "csrc/built_for.cpp" in extension.sources
        assert extension.py_limited_api == setup_script.LIMITED_API
        record = f'"torch={torch.__version__} cuda={torch_cuda}"'
        assert ("SELFDISTILL_BUILT_FOR", record) in extension.define_macros
    names = [extension.name for extension in extensions]
    if torch_cuda is None:
        assert names == ["selfdistill_kernels._C"]
        return
    assert names == ["selfdistill_kernels._C", "selfdistill_kernels._cuda"]
    sources = {Path(source).name for source in extensions[1].sources}
    assert sources == {
        "built_for.cpp",
        "ops.cpp",
        "visit.cu",
        "clip.cu",
        "statistics.cu",
        "gradient.cu",
        "gather.cu",
    }
    assert not extensions[1].optional  # a failure ends the build, which says how to do without
    if not torch.cuda.is_available():
        assert setup_script.os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0;10.0;12.0+PTX"


@pytest.fixture
def build_ext(setup_script, tmp_path, monkeypatch):
    """The build command in a folder of its own, where nothing is compiled."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no-cuda"))
    monkeypatch.setattr("torch.utils.cpp_extension.BuildExtension.build_extensions", lambda _: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "selfdistill_kernels").mkdir()
    extensions, commands = setup_script.native_extensions()
    distribution = Distribution({"ext_modules": extensions, "packages": ["selfdistill_kernels"]})
    command = commands["build_ext"](distribution)
    command.build_lib = str(tmp_path / "lib")
    command.ensure_finalized()
    command.compiler = SimpleNamespace(_compile=None, compile=None)
    return command


@pytest.mark.parametrize("same", [True, False])
def test_what_was_built_for_another_torch_is_built_anew(build_ext, setup_script, same):
    built = Path(build_ext.get_ext_fullpath("selfdistill_kernels._C"))
    built.parent.mkdir(parents=True)
    record = setup_script.built_for() if same else "torch=1.0.0 cuda=None"
    built.write_bytes(b"\0" + record.encode() + b"\0")
    build_ext.build_extensions()
    assert bool(build_ext.force) == (not same)


def test_an_extension_in_place_gives_way_to_what_was_built(build_ext):
    built = Path(build_ext.get_ext_fullpath("selfdistill_kernels._C"))
    built.parent.mkdir(parents=True)
    built.write_text("built")
    os.utime(built, (1, 1))  # older than what lies there
    here = Path("selfdistill_kernels")
    (here / built.name).write_text("of another torch")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for_one_python = here / f"_C{suffix}"
    if built.name != for_one_python.name:
        for_one_python.write_text("which Python would prefer")
    (here / f"_cuda{suffix}").write_text("another extension")
    build_ext.copy_extensions_to_source()
    assert {file.name for file in here.iterdir()} == {built.name, f"_cuda{suffix}"}
    assert (here / built.name).read_text() == "built"
