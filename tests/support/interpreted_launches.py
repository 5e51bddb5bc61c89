"""Runs recorded launches of Triton kernels under the interpreter, in a process of its own.

TRITON_INTERPRET=1 python tests/support/interpreted_launches.py FILE
The file holds what `Recorder.launches` holds; it is overwritten with the arguments after each.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUPPORT = Path(__file__).parent


@dataclass
class Recorder:
    """A launcher that keeps what went into and came out of another one.

    Attributes:
        launch: runs the kernels.
        launches: module and name of the kernel, programs, arguments before, constants.
        after: arguments after each launch.
    """

    launch: Any
    launches: list[tuple[str, str, int, dict[str, Any], dict[str, Any]]] = field(
        default_factory=list
    )
    after: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self,
        kernel: Any,
        programs: int,
        shape: Any,
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
    ) -> None:
        given = _copied(arguments)
        name = kernel.fn.__module__, kernel.fn.__name__
        self.launches.append((*name, programs, given, dict(constants)))
        self.launch(kernel, programs, shape, arguments, constants)
        self.after.append(_copied(arguments))


def _copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


def interpreted(recorder: Recorder, folder: Path) -> list[dict[str, Any]]:
    """Arguments after each launch under the interpreter."""
    file = folder / "launches.pt"
    torch.save(recorder.launches, file)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1])])
    subprocess.run([sys.executable, __file__, str(file)], env=environment, check=True)
    return torch.load(file)


def main(file: str) -> None:
    """Run the launches of a file."""
    import interpreter
    import numpy as np

    np.seterr(all="ignore")
    interpreter.round_as_hardware_does()
    after = []
    for module, name, programs, arguments, constants in torch.load(file):
        kernel = getattr(importlib.import_module(module), name)
        kernel[(programs,)](**arguments, **constants)
        after.append(arguments)
    torch.save(after, file)


if __name__ == "__main__":
    main(sys.argv[1])
