"""Which backend serves a problem: a pure function of the inputs and of what was found."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BACKENDS = ("auto", "triton", "native", "reference")

# What "auto" tries on a device, best first; the reference is last everywhere.
PREFERENCE: dict[str, tuple[str, ...]] = {"cuda": ("triton", "native"), "cpu": ("native",)}

# Backends whose statistics join those of other ranks, where the vocabulary is sharded.
JOINING = ("native", "reference")

# Least compute capability of an NVIDIA GPU for the Triton kernels (bfloat16 tensor cores).
TRITON_CAPABILITY = (8, 0)
# AMD GPUs that the Triton kernels have tiles for: MI300 and MI325, MI350 and MI355.
TRITON_AMD = ("gfx942", "gfx950")

# The dtypes that a backend takes on a device. Everything else, float64 among it, is for the oracle.
SERVED: dict[tuple[str, str], tuple[torch.dtype, ...]] = {
    ("triton", "cuda"): (torch.float32, torch.bfloat16, torch.float16),
    # Only under the interpreter.
    ("triton", "cpu"): (torch.float32, torch.bfloat16, torch.float16),
    ("native", "cuda"): (torch.float32, torch.bfloat16, torch.float16),
    ("native", "cpu"): (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class Found:
    """What this process can use.

    Attributes:
        triton_problem: None where the Triton backend can run on a GPU, else what is wrong and the
            command that mends it.
        native_problem: the same for the compiled extension.
        cuda_problem: the same for its CUDA row kernels.
        interprets: whether Triton's interpreter stands in for a GPU on CPU tensors.
        capability: compute capability of the NVIDIA GPU in question; None where there is none, or
            none was asked about.
        amd: architecture of the AMD GPU in question, such as "gfx942"; None likewise.
        untested_triton: None where the installed Triton was tested, else why "auto" takes it for no
            GPU, for a person. Whoever names the backend gets it.
    """

    triton_problem: str | None
    native_problem: str | None
    cuda_problem: str | None
    interprets: bool = False
    capability: tuple[int, int] | None = None
    amd: str | None = None
    untested_triton: str | None = None

    def missing(self, backend: str, device: str) -> str | None:
        """None, or why a backend that takes the inputs cannot run here, and what mends it."""
        if backend == "triton":
            if device != "cpu":
                if self.capability is not None and self.capability < TRITON_CAPABILITY:
                    return capability_problem(self.capability)
                if self.amd is not None and self.amd not in TRITON_AMD:
                    return amd_problem(self.amd)
                return self.triton_problem
            if not self.interprets:
                return (
                    "on CPU tensors it runs only under Triton's interpreter; with triton "
                    "installed, set TRITON_INTERPRET=1 before Python starts, or use backend='auto'"
                )
            return None
        if backend == "native":
            return self.cuda_problem if device == "cuda" else self.native_problem
        return None

    def unwanted(self, backend: str, device: str) -> str | None:
        """None, or why "auto" does not take a backend that takes the inputs."""
        missing = self.missing(backend, device)
        return self.untested_triton if missing is None and backend == "triton" else missing


def capability_problem(capability: tuple[int, int]) -> str:
    """Why a GPU is too old for the Triton kernels."""
    has, needs = (".".join(map(str, version)) for version in (capability, TRITON_CAPABILITY))
    return (
        f"it needs compute capability {needs} or later, this GPU has {has}; use backend='auto' or "
        "'reference'"
    )


def amd_problem(architecture: str) -> str:
    """Why an AMD GPU is none that the Triton kernels have tiles for."""
    return (
        f"it is for {' and '.join(TRITON_AMD)} among AMD's GPUs, this one is {architecture}; use "
        "backend='auto' or 'reference'"
    )


@dataclass(frozen=True)
class Choice:
    """A backend, and what is missing where a better one fits the inputs.

    Attributes:
        backend: a name of BACKENDS other than "auto".
        passed_over: better backends that take these inputs, each with what is missing or untested.
    """

    backend: str
    passed_over: tuple[tuple[str, str], ...] = ()


def check_backend_name(name: str) -> None:
    """Raise ValueError for a name that is no backend."""
    if name not in BACKENDS:
        raise ValueError(f"backend: unknown name {name!r}; expected one of {', '.join(BACKENDS)}")


def decide(
    name: str,
    *,
    device: str,
    dtype: torch.dtype,
    found: Found,
    is_sharded: bool = False,
) -> Choice:
    """Resolve "auto" and refuse a named backend that cannot serve these inputs.

    Args:
        name: one of BACKENDS.
        device: type of the inputs' device, such as "cuda".
        dtype: of the inputs.
        found: what this process can use.
        is_sharded: whether the vocabulary lies in parts on several ranks.

    Raises:
        ValueError: unknown name, or a named backend that does not take the device, the dtype or
            shards.
        RuntimeError: a named backend that is not available here.
    """
    check_backend_name(name)
    if is_sharded and name not in ("auto", *JOINING):
        raise ValueError(
            f"backend: {name!r} takes no heads that are sharded along the vocabulary; use "
            "backend='auto', 'native' or 'reference'"
        )
    if name == "auto":
        passed_over: list[tuple[str, str]] = []
        for backend in PREFERENCE.get(device, ()):
            if dtype not in SERVED[backend, device] or (is_sharded and backend not in JOINING):
                continue
            unwanted = found.unwanted(backend, device)
            if unwanted is None:
                return Choice(backend, tuple(passed_over))
            passed_over.append((backend, unwanted))
        return Choice("reference", tuple(passed_over))
    if name != "reference":
        if dtype not in SERVED.get((name, device), ()):
            raise ValueError(
                f"backend: {name!r} takes {served_by(name)}; got {dtype} on {device!r}: use "
                "backend='auto' or 'reference'"
            )
        missing = found.missing(name, device)
        if missing is not None:
            raise RuntimeError(f"backend: {name!r} is not available: {missing}")
    return Choice(name)


def served_by(backend: str) -> str:
    """What a backend takes, for a person: "float32, bfloat16 on 'cpu'"."""
    kinds = []
    for (name, device), dtypes in SERVED.items():
        if name == backend:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            kinds.append(f"{names} on {device!r}")
    return " and ".join(kinds)
