"""csrc/cuda is real code: nvcc builds it for every architecture, without warnings and spills."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest
from cuda_build import (
    ARCHITECTURES,
    NO_NVCC,
    ROOT,
    SOURCES,
    compile_for_gpus,
    compiler,
    find_nvcc,
)
from slow import slow_but
from torch.utils.cpp_extension import include_paths

KERNELS = {"visit": 21, "statistics": 25, "clip": 15, "gradient": 33, "gather": 5}
# Takes as long to compile as all the others, and is made of what they are made of.
SHORT = [source for source in SOURCES if source.stem != "visit"]
# So two GPUs stand for the others there.
LONG = (90, 120)
# Of a multiprocessor: 64 Ki registers and, with three blocks of 256 threads, 48 KiB of shared
# memory in a third of the smallest.
MOST_REGISTERS = 80
# Two blocks a multiprocessor there: see csrc/cuda/clip.cu.
MOST_REGISTERS_OF_CLIP = 128
MOST_SHARED = 32 << 10


@pytest.fixture(scope="module")
def nvcc() -> Path:
    found = find_nvcc()
    if found is None:
        pytest.skip(NO_NVCC)
    return found


@pytest.mark.parametrize(
    ("architecture", "source"),
    slow_but(
        [(90, source) for source in SHORT],
        [(a, source) for a in ARCHITECTURES for source in SOURCES if source in SHORT or a in LONG],
    ),
    ids=lambda value: getattr(value, "stem", value),
)
def test_builds_for_every_gpu_without_spills(nvcc, architecture, source):
    kernels, told = compile_for_gpus(nvcc, source, [architecture])
    assert "warning" not in told
    assert len(kernels) == KERNELS[source.stem], told
    for kernel in kernels:
        assert kernel.architecture == f"sm_{architecture}"
        assert kernel.stack == kernel.spills == 0, kernel
        most = MOST_REGISTERS_OF_CLIP if source.stem == "clip" else MOST_REGISTERS
        assert kernel.registers <= most, kernel
        assert kernel.shared <= MOST_SHARED, kernel


@pytest.mark.slow
def test_the_binding_compiles_against_the_cuda_headers_of_torch(nvcc, tmp_path):
    """A CPU build of torch lacks one generated header, which a CUDA build has."""
    generated = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    told = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # nvcc tells where its headers are: #$ INCLUDES="-I/usr/local/cuda/bin/../include" ...
    includes = next(line for line in told.stderr.splitlines() if "INCLUDES=" in line)
    toolkit = [part.strip('"') for part in includes.split("INCLUDES=")[1].split()]
    done = subprocess.run(
        [
            compiler(), "-fsyntax-only", "-std=c++20", "-Wall", "-Werror", "-Wno-psabi",
            f"-isystem{tmp_path}", *(f"-isystem{path}" for path in include_paths()),
            f"-isystem{sysconfig.get_path('include')}",
            *(part.replace("-I", "-isystem", 1) for part in toolkit if part.startswith("-I")),
            str(ROOT / "csrc/cuda/ops.cpp"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
