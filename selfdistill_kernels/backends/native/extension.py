"""Loads a compiled extension, unless it was built for another torch.

Torch's C++ interface changes with its releases: an extension that meets another torch than its own
fails with a mangled symbol, crashes, or misreads tensors. So each carries a record of what it was
built for (csrc/built_for.cpp), which is read from the file before anything in it runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import torch

REBUILD = "run `pip install --force-reinstall --no-deps .` in the source folder"
_RECORD = re.compile(rb"selfdistill_kernels was built for torch=(\S+) cuda=(\S+)\0")


class BuiltFor(NamedTuple):
    """What an extension was built for: a version such as "2.13.0+cu130", and the torch.version.cuda
    of that torch, such as "13.0", or None."""

    torch: str
    cuda: str | None


def load(name: str, *, missing: str) -> str | None:
    """Import selfdistill_kernels.<name>.

    Args:
        name: "_C" or "_cuda".
        missing: what to install first where the extension was never built.

    Returns:
        None when it is loaded, else what is wrong and what mends it.
    """
    spec = importlib.util.find_spec(f"selfdistill_kernels.{name}")
    if spec is None or spec.origin is None:
        return f"the compiled extension {name} was not built; {missing} and {REBUILD}"
    problem = mismatch(Path(spec.origin))
    if problem is not None:
        return f"{problem}; {REBUILD}"
    try:
        importlib.import_module(f"selfdistill_kernels.{name}")
    except ImportError as error:
        return f"the compiled extension {name} cannot be loaded ({error}); {REBUILD}"
    return None


def mismatch(file: Path) -> str | None:
    """None where an extension was built for this torch, else what it was built for."""
    built = read_record(file)
    if built is None:
        return f"{file} does not say which torch it was built for"
    if _release(built.torch) != _release(torch.__version__):
        return (
            f"{file.name} was built for torch {built.torch}, and this is torch {torch.__version__}"
        )
    if file.name.startswith("_cuda") and _major(built.cuda) != _major(torch.version.cuda):
        return (
            f"{file.name} was built for CUDA {built.cuda}, and this torch for CUDA "
            f"{torch.version.cuda}"
        )
    return None


def read_record(file: Path) -> BuiltFor | None:
    """What an extension was built for; None for one without a record."""
    found = _RECORD.search(file.read_bytes())
    if found is None:
        return None
    version, cuda = (group.decode() for group in found.groups())
    return BuiltFor(version, None if cuda == "None" else cuda)


def _release(version: str) -> str:
    """Without "+cpu" or "+cu130": one release has one interface. Other versions stay whole."""
    public = version.partition("+")[0]
    return public if re.fullmatch(r"[\d.]+", public) else version


def _major(cuda: str | None) -> str | None:
    return None if cuda is None else cuda.partition(".")[0]
