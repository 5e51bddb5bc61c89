"""Builds the native rows (csrc/) as ``selfdistill_kernels._C``; the rest is in pyproject.toml.

The extension is optional: where torch or a C++ compiler is missing, the installation goes on
without it and says so in one line. ``SELFDISTILL_KERNELS_BUILD=0`` skips it, ``=1`` makes a failure
an error. It is compiled against the installed torch: use ``pip install --no-build-isolation``.
"""

import os
import platform
import sys
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


def skip(reason: str) -> None:
    """Go on without the extension, or fail if it was asked for."""
    if BUILD == "1":
        raise SystemExit(f"selfdistill_kernels: SELFDISTILL_KERNELS_BUILD=1, but {reason}")
    print(f"selfdistill_kernels: native CPU kernels not built ({reason}).", file=sys.stderr)


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
        """Adds each file's own flags, and survives a missing compiler."""

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
            try:
                super().build_extensions()
            except Exception as error:  # compilers fail in many ways, none of which is fatal here
                skip(f"the C++ build failed: {error}")
                self.extensions.clear()

    sources = ["csrc/bindings.cpp", "csrc/cpu/ops.cpp", "csrc/cpu/gemm.cpp", "csrc/cpu/memory.cpp"]
    sources += [f"csrc/cpu/{stem}.cpp" for stem in FILE_FLAGS]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
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
        extra_compile_args=["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *openmp],
        extra_link_args=[*openmp, "-Wl,-s"] if sys.platform == "linux" else [],
    )
    return [extension], {"build_ext": BuildNative}


extensions, commands = native_extension()
setup(ext_modules=extensions, cmdclass=commands)
