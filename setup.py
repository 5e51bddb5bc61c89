"""Builds the native rows (csrc/) as ``selfdistill_kernels._C``, and those for NVIDIA GPUs as
``selfdistill_kernels._cuda``; the rest is in pyproject.toml.

An installation without its kernels would be slow and say nothing, for pip hides what a build prints
that succeeds. So a build that cannot make them fails, and what it should make is said by
``SELFDISTILL_KERNELS_BUILD``:

- ``auto``, the default: ``_C``, and ``_cuda`` where torch has CUDA and its nvcc is there
- ``cuda``: both
- ``cpu``: ``_C``
- ``none``: neither; the Triton and reference backends need no compiler

They are compiled against the torch of the environment that pip installs into, with and without
build isolation, and serve that torch under every Python: each carries a record of its torch
(csrc/built_for.cpp), and what was built for another one is built anew. ``_cuda`` needs the nvcc of
torch's CUDA (CUDA_HOME or PATH), and is built for TORCH_CUDA_ARCH_LIST: by default for the GPUs
that are there, without any for CUDA_ARCHITECTURES.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

BUILD = os.environ.get("SELFDISTILL_KERNELS_BUILD", "auto")
WITHOUT = "set SELFDISTILL_KERNELS_BUILD=none to install without compiled kernels"
# The flags of single files. csrc/cpu/ops.cpp chooses among the rows_* (one source) at run time.
# Never -march=native: what is built here may run elsewhere.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
X86_FLAGS = {
    "rows_avx2": "-mavx2 -mfma",
    "rows_avx512": AVX512,
    # GCC warns of its own intrinsics (bug 105593).
    "pack_avx512": f"{AVX512} -Wno-uninitialized -Wno-maybe-uninitialized",
}
FILE_FLAGS = {"rows_default": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    FILE_FLAGS |= X86_FLAGS
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
# A free-threaded Python has no limited API.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


def fail(reason: str, remedy: str) -> NoReturn:
    """End the build with what is wrong and what mends it."""
    raise SystemExit(f"selfdistill_kernels: {reason}; {remedy}, or {WITHOUT}")


def find_torch() -> bool:
    """Whether this build can import the torch that the extensions will meet.

    A build in isolation runs with the interpreter of the environment that pip installs into, whose
    packages pip hides; a torch of the build's own could be another release. So they are shown
    again, after what the build itself asked for.
    """
    if importlib.util.find_spec("torch") is None:
        sys.path.append(sysconfig.get_path("platlib"))
    return importlib.util.find_spec("torch") is not None


def find_nvcc(environment: dict[str, str]) -> str | None:
    """Path of nvcc, where torch looks for it: under CUDA_HOME, else on PATH."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc", path=environment.get("PATH"))


def nvcc_release(nvcc: str) -> str | None:
    """The release that `nvcc --version` tells, such as "13.0"."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", told)
    return found[1] if found else None


def cuda_reason(torch_cuda: str | None, nvcc: str | None, release: str | None) -> str | None:
    """None where the CUDA rows should be built, else why not.

    Args:
        torch_cuda: torch.version.cuda. nvcc: its path, if found. release: what nvcc says it is.
    """
    if torch_cuda is None:
        return "this torch has no CUDA"
    if nvcc is None:
        return f"no nvcc under CUDA_HOME or on PATH; install the CUDA toolkit {torch_cuda}"
    if release is None or release.split(".")[0] != torch_cuda.split(".")[0]:
        return f"torch is built for CUDA {torch_cuda}, but {nvcc} is of release {release}"
    return None


def jobs() -> int:
    """How many files to compile at a time: MAX_JOBS, as in torch's own builds, else one a core."""
    told = os.environ.get("MAX_JOBS", "")
    return int(told) if told.isdigit() and int(told) else os.cpu_count() or 1


def built_for() -> str:
    """The record of an extension; selfdistill_kernels/backends/native/extension.py reads it."""
    import torch

    return f"torch={torch.__version__} cuda={torch.version.cuda}"


def cuda_extensions(flags: list[str]) -> list[Extension]:
    """The CUDA extension, or nothing where it cannot be built. `flags` are those of the C++."""
    import torch
    from torch.utils.cpp_extension import CUDAExtension

    nvcc = find_nvcc(dict(os.environ))
    reason = cuda_reason(torch.version.cuda, nvcc, nvcc and nvcc_release(nvcc))
    if reason is not None:
        if BUILD == "cuda":
            fail(f"no CUDA kernels: {reason}", "set SELFDISTILL_KERNELS_BUILD=cpu for the others")
        return []
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    sources = ["csrc/cuda/ops.cpp", "csrc/built_for.cpp"]
    return [
        CUDAExtension(
            "selfdistill_kernels._cuda",
            [*sources, *(str(path) for path in sorted(Path("csrc/cuda").glob("*.cu")))],
            depends=["setup.py", *(str(path) for path in sorted(Path("csrc").rglob("*.*h")))],
            extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
            extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
            define_macros=[("SELFDISTILL_BUILT_FOR", f'"{built_for()}"')],
            py_limited_api=LIMITED_API,
        )
    ]


def without_torch(command: type[Command]) -> type[Command]:
    """The command as it fails where there is no torch."""

    class WithoutTorch(command):
        def run(self) -> None:
            fail(
                "the compiled kernels are built for the torch that is installed, and there is "
                f"none for {sys.executable}",
                "install torch first (a build tool that makes an environment of its own, unlike "
                "pip, must be told to build without isolation)",
            )

    return WithoutTorch


def native_extensions() -> tuple[list[Extension], dict[str, type[Command]]]:
    """The extensions and the commands that build them."""
    if BUILD not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(
            f"SELFDISTILL_KERNELS_BUILD: got {BUILD!r}, expected auto, cuda, cpu or none"
        )
    if BUILD == "none":
        return [], {}
    if not find_torch():
        # Metadata come first, so that pip ends before it has fetched anything. A source
        # distribution needs none of these.
        return [], {
            "dist_info": without_torch(dist_info),
            "bdist_wheel": without_torch(bdist_wheel),
            "build_ext": without_torch(build_ext),
        }
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildNative(BuildExtension):
        """Adds each file's own flags, builds anew for another torch, and says what a failure
        means."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | {"use_ninja": False})

        def build_extensions(self) -> None:
            compile_file = self.compiler._compile

            def compile_with_flags(
                obj: str, src: str, ext: str, cc_args: Any, postargs: list[str], pp_opts: Any
            ) -> None:
                flags = FILE_FLAGS.get(Path(src).stem, "").split()
                compile_file(obj, src, ext, cc_args, [*postargs, *flags], pp_opts)

            self.compiler._compile = compile_with_flags
            compile_files = self.compiler.compile

            def compile_at_once(sources: list[str], *args: Any, **options: Any) -> list[str]:
                # Torch's wrapper changes the compiler itself while nvcc has its turn.
                if any(source.endswith(".cu") for source in sources):
                    return compile_files(sources, *args, **options)
                with ThreadPoolExecutor(jobs()) as pool:
                    made = pool.map(lambda one: compile_files([one], *args, **options), sources)
                    return [name for names in made for name in names]

            self.compiler.compile = compile_at_once
            for extension in self.extensions:
                earlier = Path(self.get_ext_fullpath(extension.name))
                if earlier.exists() and built_for().encode() not in earlier.read_bytes():
                    self.force = True
            try:
                super().build_extensions()
            except Exception as error:  # compilers fail in many ways
                fail(
                    f"the build of the kernels failed ({error})",
                    "mend what the compiler says above, set SELFDISTILL_KERNELS_BUILD=cpu where "
                    "it is the CUDA kernels that fail",
                )

        def copy_extensions_to_source(self) -> None:
            self.force = True  # what lies there may be younger, and of another torch
            super().copy_extensions_to_source()
            for extension in self.extensions:
                built = Path(self.get_ext_filename(extension.name))
                # Python would prefer one that was built for this Python only.
                for other in built.parent.glob(f"{built.name.partition('.')[0]}.*{built.suffix}"):
                    if built.exists() and other != built:
                        other.unlink()

    sources = ["csrc/bindings.cpp", "csrc/built_for.cpp"]
    sources += [
        "csrc/cpu/ops.cpp",
        "csrc/cpu/gemm.cpp",
        "csrc/cpu/transposed.cpp",
        "csrc/cpu/widened.cpp",
        "csrc/cpu/rounding.cpp",
        "csrc/cpu/memory.cpp",
    ]
    sources += [f"csrc/cpu/{stem}.cpp" for stem in FILE_FLAGS]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    flags = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *openmp]
    extension = CppExtension(
        "selfdistill_kernels._C",
        sources,
        depends=[
            "setup.py",
            *(
                str(path)
                for path in sorted(Path("csrc").rglob("*"))
                if path.suffix in (".h", ".inl")
            ),
        ],
        extra_compile_args=flags,
        extra_link_args=[*openmp, "-Wl,-s"] if sys.platform == "linux" else [],
        define_macros=[("SELFDISTILL_BUILT_FOR", f'"{built_for()}"')],
        py_limited_api=LIMITED_API,
    )
    cuda = [] if BUILD == "cpu" else cuda_extensions(flags)
    return [extension, *cuda], {"build_ext": BuildNative}


if __name__ == "__main__":
    extensions, commands = native_extensions()
    tag = {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {}
    setup(ext_modules=extensions, cmdclass=commands, options=tag)
