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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
NO_NVCC = (
    "nvcc not found; install the CUDA toolkit 13.0 or newer, or `pip install nvidia-cuda-nvcc "
    "nvidia-cuda-cccl` into this environment"
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


def compile_for_gpus(nvcc: Path, source: Path, output: Path) -> tuple[list[Kernel], str]:
    """Kernels of one .cu for every architecture, warnings as errors; and the compiler's words.

    Raises:
        RuntimeError: it does not compile.
    """
    command = [
        str(nvcc), "-O3", *TORCH_FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills",
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES),
        "-c", str(source), "-o", str(output),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for GPUs:\n{told}")
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


HOST_FLAGS = (
    "-std=c++20", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-clobbered",
    "-Wno-unknown-pragmas", "-Wno-unused-function",
)  # fmt: skip


def run(command: list[str], **options: Any) -> None:
    """Raise with the output where a command fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def compile_kernels_for_host(
    folder: Path, flags: tuple[str, ...] = ("-O2",), csrc: Path = ROOT / "csrc"
) -> list[Path]:
    """Objects of the .cu files with tests/cuda/emulation.h in place of CUDA."""

    def compile_one(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        run(
            [
                compiler(), *HOST_FLAGS, *flags, "-include", str(ROOT / "tests/cuda/emulation.h"),
                "-x", "c++", "-c", str(source), "-o", str(output),
            ]
        )  # fmt: skip
        return output

    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(compile_one, sorted((csrc / "cuda").glob("*.cu"))))


def build_driver(
    folder: Path, flags: tuple[str, ...] = ("-O1",), csrc: Path = ROOT / "csrc"
) -> Path:
    """tests/cuda/driver.cpp with the emulated kernels."""
    objects = compile_kernels_for_host(folder, flags, csrc)
    driver = folder / "driver"
    run(
        [
            compiler(), *HOST_FLAGS, *flags, "-include", str(ROOT / "tests/cuda/emulation.h"),
            str(ROOT / "tests/cuda/driver.cpp"), *map(str, objects), "-o", str(driver),
        ]
    )  # fmt: skip
    return driver


def build_emulated_operators(folder: Path, csrc: Path = ROOT / "csrc") -> Path:
    """A library that registers csrc/cuda for the CUDA dispatch key, but runs it on CPU tensors."""
    from torch.utils.cpp_extension import include_paths, library_paths

    objects = compile_kernels_for_host(folder, csrc=csrc)
    library = folder / "emulated.so"
    run(
        [
            compiler(), *HOST_FLAGS, "-O1", "-Wno-unused-parameter", "-Wno-psabi", "-shared",
            "-DSELFDISTILL_DEVICE_TYPE=at::kCPU", "-isystem", str(ROOT / "tests/cuda/include"),
            *(f"-isystem{path}" for path in include_paths()),
            f"-isystem{sysconfig.get_path('include')}",
            str(csrc / "cuda/ops.cpp"), *map(str, objects), "-o", str(library),
            *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu",
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
        kernels, _ = compile_for_gpus(nvcc, source, Path(os.devnull))
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
