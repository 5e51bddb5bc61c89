"""What this process has of the backends, and the one that serves a problem."""

from __future__ import annotations

import functools
import importlib
import os
import warnings

import torch

from selfdistill_kernels.backends.dispatch import Found, decide
from selfdistill_kernels.backends.interface import Backend
from selfdistill_kernels.backends.native import NativeBackend, extension
from selfdistill_kernels.backends.reference import ReferenceBackend
from selfdistill_kernels.backends.triton_versions import installed_triton, untested

CPU_TORCH = "this torch is built for CPUs only; install one for your GPU (pytorch.org/get-started)"


def choose_backend(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    is_sharded: bool = False,
) -> str:
    """Resolve "auto" and refuse a backend that cannot serve these inputs (dispatch.decide).

    Raises:
        ValueError: unknown name, or a named backend that does not take the device or dtype.
        RuntimeError: a named backend that is not available here.
    """
    here = found_on(device)
    choice = decide(
        name,
        device=device.type,
        dtype=dtype,
        found=here,
        is_sharded=is_sharded,
    )
    # The rows of the native backend are no loss on a GPU where nothing else was to be had; a Triton
    # that is there and not taken is worth a word.
    refused = ("triton", here.untested_triton) in choice.passed_over
    told = refused or (choice.backend == "reference" and choice.passed_over)
    if told and not torch.compiler.is_compiling():
        _warn_once(choice.backend, choice.passed_over)
    return choice.backend


def get_backend(name: str) -> Backend:
    """Return the backend for a resolved name."""
    if name == "triton":
        # By name: the package imports triton.
        module = importlib.import_module(f"{__package__}.triton")
        backend: Backend = module.TritonBackend()
        return backend
    return NativeBackend() if name == "native" else ReferenceBackend()


def found() -> Found:
    """What this process can use; settled at import."""
    return _FOUND


def found_on(device: torch.device) -> Found:
    """The same, with the GPU that a device names."""
    if device.type != "cuda" or (torch.version.cuda is None and torch.version.hip is None):
        return _FOUND
    properties = torch.cuda.get_device_properties(device)
    is_amd = torch.version.hip is not None
    return Found(
        triton_problem=_FOUND.triton_problem,
        native_problem=_FOUND.native_problem,
        cuda_problem=_FOUND.cuda_problem,
        interprets=_FOUND.interprets,
        capability=None if is_amd else (properties.major, properties.minor),
        amd=properties.gcnArchName.partition(":")[0] if is_amd else None,
        untested_triton=_FOUND.untested_triton,
    )


def native_problem() -> str | None:
    """None when the compiled extension is loaded, else what is wrong and what mends it."""
    return _FOUND.native_problem


def cuda_problem() -> str | None:
    """None when the CUDA row kernels are loaded, else what is wrong and what mends it."""
    return _FOUND.cuda_problem


def _find() -> Found:
    native = _load_native()
    version = installed_triton()
    return Found(
        triton_problem=_triton_problem(version is not None),
        native_problem=native,
        cuda_problem=native or _load_cuda(),
        interprets=version is not None and os.environ.get("TRITON_INTERPRET") == "1",
        untested_triton=None if version is None else untested(version),
    )


def _load_native() -> str | None:
    return extension.load("_C", missing="install a C++ compiler")


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return CPU_TORCH
    toolkit = f"install the CUDA toolkit {torch.version.cuda} (nvcc on PATH or CUDA_HOME)"
    return extension.load("_cuda", missing=toolkit)


def _triton_problem(has_triton: bool) -> str | None:
    """Whether the Triton kernels could run on a GPU; triton is imported on first use, because that
    takes a while."""
    if not has_triton:
        return "the package triton is missing; run `pip install 'triton>=3.5,<3.10'`"
    has_gpu_build = torch.version.cuda is not None or torch.version.hip is not None
    return None if has_gpu_build else CPU_TORCH


@functools.cache
def _warn_once(backend: str, passed_over: tuple[tuple[str, str], ...]) -> None:
    reasons = "; ".join(f"{backend}: {missing}" for backend, missing in passed_over)
    cost = ", which materialises [tokens, vocabulary]" if backend == "reference" else ""
    warnings.warn(
        f"selfdistill_kernels: using the {backend} backend{cost}: {reasons}",
        RuntimeWarning,
        stacklevel=2,
    )


# At import, not on first use: torch.compile can then read the answer as a constant.
_FOUND = _find()
