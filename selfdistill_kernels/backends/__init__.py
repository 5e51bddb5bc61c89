"""Backends and the choice between them."""

from __future__ import annotations

import functools
import importlib
import warnings

import torch

from selfdistill_kernels.backends.base import Backend
from selfdistill_kernels.backends.reference import ReferenceBackend

BACKENDS = ("auto", "native", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve "auto" and refuse a backend that cannot serve these inputs.

    Raises:
        ValueError: unknown name, or a named backend that does not fit the device or dtype.
        RuntimeError: "native" was asked for and its extension is not built.
    """
    check_backend_name(name)
    on_gpu = device.type == "cuda"
    fits_native = dtype in (
        CUDA_DTYPES if on_gpu else NATIVE_DTYPES if device.type == "cpu" else ()
    )
    problem_of = cuda_problem if on_gpu else native_problem
    if name == "native":
        if not fits_native:
            raise ValueError(
                "backend: 'native' takes float32 or bfloat16 tensors on the CPU or a CUDA device, "
                f"and there float16, got {dtype} on {device}; use backend='auto' or 'reference'"
            )
        problem = problem_of()
        if problem is not None:
            raise RuntimeError(f"backend: 'native' is not available: {problem}")
        return name
    if name == "auto" and fits_native:
        problem = problem_of()
        if problem is None:
            return "native"
        if not torch.compiler.is_compiling():
            _warn_once(problem)
    return "reference"


def check_backend_name(name: str) -> None:
    """Raise ValueError for a name that is no backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend: unknown name {name!r}; expected one of {', '.join(BACKENDS)}")


def get_backend(name: str) -> Backend:
    """Return the backend for a resolved name."""
    if name == "native":
        from selfdistill_kernels.backends.native import NativeBackend

        return NativeBackend()
    return ReferenceBackend()


def _load_native() -> str | None:
    try:
        importlib.import_module("selfdistill_kernels._C")
    except ImportError as error:
        return (
            f"the compiled extension cannot be loaded ({error}); install a C++17 compiler and run "
            "`pip install --no-build-isolation --force-reinstall --no-deps selfdistill`"
        )
    return None


def _load_cuda() -> str | None:
    if _NATIVE_PROBLEM is not None:
        return _NATIVE_PROBLEM
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    try:
        importlib.import_module("selfdistill_kernels._cuda")
    except ImportError as error:
        return (
            f"the CUDA row kernels cannot be loaded ({error}); install the CUDA toolkit "
            f"{torch.version.cuda} (nvcc on PATH or CUDA_HOME) and run "
            "`pip install --no-build-isolation --force-reinstall --no-deps selfdistill`"
        )
    return None


# At import, not on first use: torch.compile can then read the answer as a constant.
_NATIVE_PROBLEM = _load_native()
_CUDA_PROBLEM = _load_cuda()


def native_problem() -> str | None:
    """None when the compiled extension is loaded, else what is wrong and what mends it."""
    return _NATIVE_PROBLEM


def cuda_problem() -> str | None:
    """None when the CUDA row kernels are loaded, else what is wrong and what mends it."""
    return _CUDA_PROBLEM


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(
        f"selfdistill_kernels: using the reference backend, which materialises [tokens, "
        f"vocabulary]: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )
