"""Backends and the choice between them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings

import torch

from selfdistill_kernels.backends.base import Backend
from selfdistill_kernels.backends.reference import ReferenceBackend

BACKENDS = ("auto", "triton", "native", "reference")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve "auto" and refuse a backend that cannot serve these inputs.

    Raises:
        ValueError: unknown name, or a named backend that does not fit the device or dtype.
        RuntimeError: "native" was asked for and its extension is not built, or "triton" and the
            package is missing.
    """
    check_backend_name(name)
    fits_native = device.type == "cpu" and dtype in NATIVE_DTYPES
    if name == "native":
        if not fits_native:
            raise ValueError(
                f"backend: 'native' takes float32 or bfloat16 tensors on the CPU, got {dtype} on "
                f"{device}; use backend='auto' or 'reference'"
            )
        problem = native_problem()
        if problem is not None:
            raise RuntimeError(f"backend: 'native' is not available: {problem}")
        return name
    if name == "triton":
        on_device = device.type == "cuda" or (device.type == "cpu" and _INTERPRETS)
        if dtype not in TRITON_DTYPES or not on_device:
            raise ValueError(
                f"backend: 'triton' takes float32, bfloat16 or float16 tensors on a GPU, got "
                f"{dtype} on {device}; use backend='auto' (CPU tensors only under Triton's "
                "interpreter: set TRITON_INTERPRET=1 before the first import)"
            )
        problem = triton_problem()
        if problem is not None:
            raise RuntimeError(f"backend: 'triton' is not available: {problem}")
        return name
    if name == "auto" and fits_native:
        problem = native_problem()
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
    if name == "triton":
        from selfdistill_kernels.backends.triton import TritonBackend

        return TritonBackend()
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


# At import, not on first use: torch.compile can then read the answer as a constant.
_NATIVE_PROBLEM = _load_native()


def native_problem() -> str | None:
    """None when the compiled extension is loaded, else what is wrong and what mends it."""
    return _NATIVE_PROBLEM


_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"


def triton_problem() -> str | None:
    """None when Triton is installed, else what is wrong and what mends it."""
    if not _HAS_TRITON:
        return "the package triton is missing; run `pip install 'selfdistill[triton]'`"
    return None


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(
        f"selfdistill_kernels: using the reference backend, which materialises [tokens, "
        f"vocabulary]: {problem}",
        RuntimeWarning,
        stacklevel=2,
    )
