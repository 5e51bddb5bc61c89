"""Makes the sources of selfdistill_kernels independent of their name.

The hub's loader gives a kernel a name of its own, so that several versions of it can be in one
process. So imports among its modules have to be relative, and its operators lie in a namespace that
the build chooses and writes into `_ops.py` at the root of the package.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

PACKAGE = "selfdistill_kernels"
_IMPORT = re.compile(rf"^(\s*)from {PACKAGE}(?:\.([\w.]+))? import ", flags=re.MULTILINE)
_OPERATORS = "torch.ops.selfdistill"
_QUALIFIED = re.compile(r'"selfdistill::(\w+)"')
_FUTURE = "from __future__ import annotations\n"


def relocate(source: str, place: PurePosixPath) -> str:
    """The source of a module as it is in a kernel of the hub.

    Args:
        source: of a module of selfdistill_kernels.
        place: its path in the package, such as backends/registry.py.

    Raises:
        ValueError: the source names the package or the operators in a way that is not known here.
    """
    up = "." * len(place.parts)
    # Docstrings may name things as they are called in this repository.
    moved = _IMPORT.sub(lambda found: f"{found[1]}from {up}{found[2] or ''} import ", source)
    needed = []
    if _OPERATORS in moved:
        moved = moved.replace(_OPERATORS, "hub_operators")
        needed.append("ops as hub_operators")
    if _QUALIFIED.search(moved):
        moved = _QUALIFIED.sub(r'add_op_namespace_prefix("\1")', moved)
        needed.append("add_op_namespace_prefix")
    if needed:
        if moved.count(_FUTURE) != 1:
            raise ValueError(f"{place}: expected one line {_FUTURE.strip()!r}")
        moved = moved.replace(_FUTURE, f"{_FUTURE}\nfrom {up}_ops import {', '.join(needed)}\n")
    left = re.search(rf"^\s*import {PACKAGE}\b|import_module\(f?\"{PACKAGE}", moved, re.MULTILINE)
    if left is not None:
        raise ValueError(f"{place}: {left[0].strip()!r} names the package; import relatively")
    return moved
