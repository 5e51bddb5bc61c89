"""Builds the native rows (csrc/) as ``selfdistill_kernels._C``, and those for NVIDIA GPUs as
``selfdistill_kernels._cuda``; the rest is in pyproject.toml.

The extensions are optional: where torch or a C++ compiler is missing, the installation goes on
without them and says so in one line. ``SELFDISTILL_KERNELS_BUILD=0`` skips them, ``=1`` makes a
failure an error. They are compiled against the installed torch, so use
``pip install --no-build-isolation``, and serve that torch under every Python: each carries a record
of its torch (csrc/built_for.cpp), and what was built for another one is built anew. ``_cuda`` needs
a torch with CUDA and the nvcc of that CUDA (CUDA_HOME or PATH), and is built for
TORCH_CUDA_ARCH_LIST: by default for the GPUs that are there, without any for CUDA_ARCHITECTURES.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Command, Extension, setup

BUILD = os.environ.get("SELFDISTILL_KERNELS_BUILD", "auto")
# The flags of single files. csrc/cpu/ops.cpp chooses among the rows_* (one source) at run time.
# Never -march=native: what is built here may run elsewhere.
FILE_FLAGS: dict[str, str] = {"rows_default": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    FILE_FLAGS["rows_avx2"] = "-mavx2 -mfma"
    FILE_FLAGS["rows_avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"
    # GCC warns of its own intrinsics (bug 105593).
    FILE_FLAGS["pack_avx512"] = (
        FILE_FLAGS["rows_avx512"] + " -Wno-uninitialized -Wno-maybe-uninitialized"
    )
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
# A free-threaded Python has no limited API.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


def skip(reason: str, kernels: str = "native CPU kernels") -> None:
    """Go on without the extension, or fail if it was asked for."""
    if BUILD == "1":
        raise SystemExit(f"selfdistill_kernels: SELFDISTILL_KERNELS_BUILD=1, but {reason}")
    print(f"selfdistill_kernels: {kernels} not built ({reason}).", file=sys.stderr)


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
        if torch.version.cuda is not None:  # nobody misses them with a CPU build of torch
            skip(reason, "CUDA kernels")
        return []
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    sources = ["csrc/cuda/ops.cpp", "csrc/built_for.cpp"]
    extension = CUDAExtension(
        "selfdistill_kernels._cuda",
        [*sources, *(str(path) for path in sorted(Path("csrc/cuda").glob("*.cu")))],
        depends=["setup.py", *(str(path) for path in sorted(Path("csrc").rglob("*.*h")))],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        define_macros=[("SELFDISTILL_BUILT_FOR", f'"{built_for()}"')],
        py_limited_api=LIMITED_API,
    )
    extension.optional = BUILD != "1"  # its failure does not take the CPU rows along
    return [extension]


def native_extension() -> tuple[list[Extension], dict[str, type[Command]]]:
    """The extension and its build command, or nothing where it cannot or should not be built."""
    if BUILD not in ("auto", "0", "1"):
        raise SystemExit(f"SELFDISTILL_KERNELS_BUILD: got {BUILD!r}, expected 0, 1 or auto")
    if BUILD == "0":
        skip("SELFDISTILL_KERNELS_BUILD=0")
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        skip("torch is not installed here; install it first and use --no-build-isolation")
        return [], {}

    class BuildNative(BuildExtension):
        """Adds each file's own flags, builds anew for another torch, and survives a missing
        compiler."""

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
            for extension in self.extensions:
                earlier = Path(self.get_ext_fullpath(extension.name))
                if earlier.exists() and built_for().encode() not in earlier.read_bytes():
                    self.force = True
            try:
                super().build_extensions()
            except Exception as error:  # compilers fail in many ways, none of which is fatal here
                skip(f"the C++ build failed: {error}")
                self.extensions.clear()

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
        "csrc/cpu/widened.cpp",
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
    return [extension, *cuda_extensions(flags)], {"build_ext": BuildNative}


if __name__ == "__main__":
    extensions, commands = native_extension()
    tag = {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {}
    setup(ext_modules=extensions, cmdclass=commands, options=tag)
