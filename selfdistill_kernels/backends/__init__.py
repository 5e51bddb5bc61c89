"""Backends: what this process has of them, and the one that serves a problem."""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch

from selfdistill_kernels.backends.base import Backend
from selfdistill_kernels.backends.dispatch import BACKENDS, Found, check_backend_name, decide
from selfdistill_kernels.backends.reference import ReferenceBackend

__all__ = [
    "BACKENDS",
    "check_backend_name",
    "choose_backend",
    "found",
    "get_backend",
    "native_problem",
]


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve "auto" and refuse a backend that cannot serve these inputs (dispatch.decide).

    Raises:
        ValueError: unknown name, or a named backend that does not take the device or dtype.
        RuntimeError: a named backend that is not available here.
    """
    choice = decide(name, device=device.type, dtype=dtype, found=_FOUND)
    if choice.backend == "reference" and choice.passed_over and not torch.compiler.is_compiling():
        _warn_once(choice.passed_over)
    return choice.backend


def get_backend(name: str) -> Backend:
    """Return the backend for a resolved name."""
    if name == "triton":
        backend: Backend = importlib.import_module(_TRITON).TritonBackend()
        return backend
    if name == "native":
        from selfdistill_kernels.backends.native import NativeBackend

        return NativeBackend()
    return ReferenceBackend()


def found() -> Found:
    """What this process can use; settled at import."""
    return _FOUND


def native_problem() -> str | None:
    """None when the compiled extension is loaded, else what is wrong and what mends it."""
    return _FOUND.native_problem


_TRITON = "selfdistill_kernels.backends.triton"


def _find() -> Found:
    native = _load_native()
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return Found(
        triton_problem=_ask_triton(interprets),
        native_problem=native,
        has_cuda_rows=native is None
        and torch._C._dispatch_has_kernel_for_dispatch_key("selfdistill::row_visit_", "CUDA"),
        interprets=interprets,
    )


def _load_native() -> str | None:
    try:
        importlib.import_module("selfdistill_kernels._C")
    except ImportError as error:
        return (
            f"the compiled extension cannot be loaded ({error}); install a C++17 compiler and run "
            "`pip install --no-build-isolation --force-reinstall --no-deps selfdistill`"
        )
    return None


def _ask_triton(interprets: bool) -> str | None:
    if not interprets and torch.version.cuda is None and torch.version.hip is None:
        # Nor is triton imported, which takes a while.
        return "this torch is built for CPUs only; install one for CUDA or ROCm (pytorch.org)"
    try:
        problem: str | None = importlib.import_module(_TRITON).triton_problem()
    except ImportError as error:
        return f"the Triton backend cannot be loaded ({error}); run `pip install 'triton>=3.5'`"
    return problem


@functools.cache
def _warn_once(passed_over: tuple[tuple[str, str], ...]) -> None:
    reasons = "; ".join(f"{backend}: {missing}" for backend, missing in passed_over)
    warnings.warn(
        f"selfdistill_kernels: using the reference backend, which materialises [tokens, "
        f"vocabulary]: {reasons}",
        RuntimeWarning,
        stacklevel=2,
    )


# At import, not on first use: torch.compile can then read the answer as a constant.
_FOUND = _find()
