"""One folder for each backend, behind one interface; `registry` says which of them is here."""

from selfdistill_kernels.backends.dispatch import BACKENDS, check_backend_name
from selfdistill_kernels.backends.registry import (
    choose_backend,
    cuda_problem,
    found,
    found_on,
    get_backend,
    native_problem,
)

__all__ = [
    "BACKENDS",
    "check_backend_name",
    "choose_backend",
    "cuda_problem",
    "found",
    "found_on",
    "get_backend",
    "native_problem",
]
