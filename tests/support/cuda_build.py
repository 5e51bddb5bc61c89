"""csrc/cuda through nvcc for real GPUs, and through g++ for the emulation of tests/cuda.

`python tests/support/cuda_build.py` prints the table of docs/gpu-evidence.md.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from build_cache import CACHE, made_once

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
NO_NVCC = (
    "nvcc not found; install the CUDA toolkit 13.0 or newer, or `pip install -r "
    "requirements-nvcc.txt` into this environment, as `make test-all` does"
)
# What torch's extension builder adds: the code must be the same code there.
TORCH_FLAGS = (
    "-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr", "-std=c++20",
)  # fmt: skip


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, of PATH, or of the pip packages of this environment."""
    candidates = [
        shutil.which(
            "nvcc", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
        ),
        shutil.which("nvcc"),
        *(str(p) for p in Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc")),
    ]
    return next((Path(found) for found in candidates if found and Path(found).exists()), None)


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    shared: int


_KERNEL = re.compile(
    r"Compiling entry function '(\S+)' for '(\S+)'\n.*\n\s+(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers(.*)"
)


def headers(csrc: Path) -> list[Path]:
    """What a .cu may include from csrc."""
    return sorted(p for p in csrc.rglob("*") if p.suffix in (".h", ".cuh"))


def compile_for_gpus(
    nvcc: Path,
    source: Path,
    architectures: Sequence[int] = ARCHITECTURES,
    *,
    cache: Path = CACHE,
) -> tuple[list[Kernel], str]:
    """Kernels of one .cu for some architectures, warnings as errors; and the compiler's words.

    Raises:
        RuntimeError: it does not compile.
    """
    command = [
        str(nvcc), "-O3", *TORCH_FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills",
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures), "-c",
    ]  # fmt: skip

    def make(output: Path) -> None:
        with TemporaryDirectory() as folder:
            output.write_text(run([*command, str(source), "-o", f"{folder}/kernels.o"]))

    told = made_once(
        f"{source.stem}.txt",
        make,
        files=[source, *headers(source.parents[1])],
        settings=[*command, version(str(nvcc)), version(compiler())],
        cache=cache,
    ).read_text()
    kernels = []
    for name, architecture, stack, stores, loads, registers, rest in _KERNEL.findall(told):
        shared = re.search(r"(\d+) bytes smem", rest)
        kernels.append(
            Kernel(
                name, architecture, int(registers), int(stack), int(stores) + int(loads),
                int(shared[1]) if shared else 0,
            )
        )  # fmt: skip
    return kernels, told


def compiler() -> str:
    """The C++ compiler of the environment."""
    return os.environ.get("CXX", "g++")


def version(program: str) -> str:
    """Which compiler it is: where it lies, and what it says of itself."""
    return f"{shutil.which(program)} {run([program, '--version'])}"


HOST_FLAGS = (
    "-std=c++20", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-clobbered",
    "-Wno-unknown-pragmas", "-Wno-unused-function",
)  # fmt: skip
EMULATION = ROOT / "tests/cuda/emulation.h"
OPTIMIZED = ("-O1",)  # the driver is no faster with -O2, and compiles longer


def run(command: list[str]) -> str:
    """What a command prints; raises RuntimeError with it where the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_for_host(
    source: Path,
    csrc: Path,
    flags: Sequence[str],
    *,
    more: Sequence[Path] = (),
    cache: Path = CACHE,
) -> Path:
    """The object of one file, with tests/cuda/emulation.h in place of CUDA.

    Args:
        csrc: The folder that it includes headers from.
        more: Files outside of csrc that it includes beside emulation.h.
    """
    command = [
        compiler(), *HOST_FLAGS, *flags, "-include", str(EMULATION), "-x", "c++", "-c",
    ]  # fmt: skip
    return made_once(
        f"{source.stem}.o",
        lambda output: run([*command, str(source), "-o", str(output)]),
        files=[source, EMULATION, *headers(csrc), *more],
        settings=[*command, version(compiler())],
        cache=cache,
    )


def compile_kernels_for_host(
    flags: Sequence[str] = OPTIMIZED, csrc: Path = ROOT / "csrc"
) -> list[Path]:
    """Objects of the .cu files with tests/cuda/emulation.h in place of CUDA."""
    sources = sorted((csrc / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda source: compile_for_host(source, csrc, flags), sources))


def build_driver(
    folder: Path, flags: Sequence[str] = OPTIMIZED, csrc: Path = ROOT / "csrc"
) -> Path:
    """tests/cuda/driver.cpp with the emulated kernels."""
    main = compile_for_host(ROOT / "tests/cuda/driver.cpp", ROOT / "csrc", flags)
    objects = [main, *compile_kernels_for_host(flags, csrc)]
    driver = folder / "driver"
    run([compiler(), *flags, *map(str, objects), "-o", str(driver)])
    return driver


def build_emulated_operators(folder: Path, csrc: Path = ROOT / "csrc") -> Path:
    """A library that registers csrc/cuda for the CUDA dispatch key, but runs it on CPU tensors."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    standing_in = ROOT / "tests/cuda/include"
    flags = [
        *OPTIMIZED, "-Wno-unused-parameter", "-Wno-psabi", "-DSELFDISTILL_DEVICE_TYPE=at::kCPU",
        f"-isystem{standing_in}", *(f"-isystem{path}" for path in include_paths()),
        f"-isystem{sysconfig.get_path('include')}",
    ]  # fmt: skip
    operators = compile_for_host(
        csrc / "cuda/ops.cpp",
        csrc,
        flags,
        more=[*sorted(standing_in.rglob("*.h")), Path(torch.version.__file__)],
    )
    library = folder / "emulated.so"
    run(
        [
            compiler(), "-shared", str(operators), *map(str, compile_kernels_for_host(csrc=csrc)),
            "-o", str(library), *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu",
        ]
    )  # fmt: skip
    return library


def main() -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit(NO_NVCC)
    print("| file | architecture | kernels | registers | stack | spills | shared memory |")
    print("|---|---|---|---|---|---|---|")
    for source in SOURCES:
        kernels, _ = compile_for_gpus(nvcc, source)
        for architecture in ARCHITECTURES:
            mine = [k for k in kernels if k.architecture == f"sm_{architecture}"]
            registers = [k.registers for k in mine]
            print(
                f"| {source.name} | sm_{architecture} | {len(mine)} | {min(registers)}-"
                f"{max(registers)} | {max(k.stack for k in mine)} | "
                f"{max(k.spills for k in mine)} | {max(k.shared for k in mine)} |"
            )


if __name__ == "__main__":
    main()
