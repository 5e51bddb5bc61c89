"""Machine code as wave.c takes it: a table of decoded instructions, and the compiled wave.c."""

from __future__ import annotations

import ctypes
import functools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from build_cache import made_once
from cuda_build import run, version

from amd_machine.encodings import DEFAULTS, Unsupported, decode
from amd_machine.lanes import LANES, cross_lanes

HERE = Path(__file__).parent
GROUPS = [HERE / f"{name}.inc" for name in ("scalar", "vector", "float", "memory", "matrix")]
SOURCES = [HERE / name for name in ("wave.c", "wave.h", "accesses.h", "numbers.h")]
FLAGS = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC")

INSTRUCTION = np.dtype(
    [
        ("operation", "i4"), ("to", "i4"), ("scalar_to", "i4"), ("source", "i4", 3),
        ("negate", "i4"), ("absolute", "i4"), ("negate_high", "i4"),
        ("select", "i4"), ("select_high", "i4"), ("clamp", "i4"), ("scale", "i4"),
        ("part", "i4", 2), ("extend", "i4", 2), ("part_to", "i4"), ("part_rest", "i4"),
        ("cross", "i4"), ("offset", "i4"), ("offset_high", "i4"), ("size", "i4"), ("depth", "i4"),
        ("kind", "i4"), ("condition", "i4"), ("half", "i4"), ("signed_load", "i4"),
        ("to_lds", "i4"), ("next", "i4"), ("literal", "u4"),
    ]
)  # fmt: skip
CROSS = np.dtype([("writes", "u8"), ("from", "i1", LANES)])
TENSOR = np.dtype([("first", "u8"), ("last", "u8"), ("seen", "u8")])


class ProgramView(ctypes.Structure):
    """`Program` of wave.h."""

    _fields_ = [
        ("code", ctypes.c_void_p), ("cross", ctypes.c_void_p), ("hits", ctypes.c_void_p),
        ("removed_barrier", ctypes.c_int32),
    ]  # fmt: skip


class WaveView(ctypes.Structure):
    """`Wave` of wave.h."""

    _fields_ = [
        ("vectors", ctypes.c_void_p), ("scalars", ctypes.c_void_p), ("lds", ctypes.c_void_p),
        ("lds_seen", ctypes.c_void_p), ("tensors", ctypes.c_void_p),
        ("tensor_count", ctypes.c_uint64), ("lds_size", ctypes.c_uint64),
        ("executed", ctypes.c_uint64), ("outside", ctypes.c_uint64),
        ("fault_address", ctypes.c_uint64),
        ("scc", ctypes.c_int32), ("counter", ctypes.c_int32),
        ("state", ctypes.c_int32), ("fault_counter", ctypes.c_int32),
        ("group", ctypes.c_int32), ("wave", ctypes.c_int32), ("epoch", ctypes.c_int32),
    ]  # fmt: skip


@functools.cache
def operations() -> dict[str, int]:
    """The operations that wave.c does, numbered in the order of their sources."""
    found: dict[str, None] = {}
    for path in GROUPS:
        for line in path.read_text().splitlines():
            if not line.startswith("#"):
                found |= dict.fromkeys(re.findall(r"\b[A-Z_]+\(([A-Z]+_?[A-Z0-9_]+)[,)]", line))
    return {name: number for number, name in enumerate(found, start=1)}


@functools.cache
def machine() -> ctypes.CDLL:
    """wave.c, compiled by the C compiler of the environment."""
    compiler = os.environ.get("CC", "cc")
    names = ", ".join(f"OP_{name} = {number}" for name, number in operations().items())

    def make(output: Path) -> None:
        with TemporaryDirectory() as folder:
            (Path(folder) / "operations.h").write_text(f"enum {{ {names} }};\n")
            run([compiler, *FLAGS, f"-I{folder}", str(HERE / "wave.c"), "-o", str(output), "-lm"])

    library = ctypes.CDLL(
        str(
            made_once(
                "amd_machine.so",
                make,
                files=[*SOURCES, *GROUPS],
                settings=[*FLAGS, names, version(compiler)],
            )
        )
    )
    sizes = list((ctypes.c_int32 * 5).in_dll(library, "sizes"))
    ours = [d.itemsize for d in (INSTRUCTION, CROSS, TENSOR)]
    assert sizes == [*ours, ctypes.sizeof(ProgramView), ctypes.sizeof(WaveView)], sizes
    library.run_wave.argtypes = [
        ctypes.POINTER(WaveView), ctypes.POINTER(ProgramView), ctypes.c_int64,
    ]  # fmt: skip
    library.run_wave.restype = None
    return library


@dataclass
class Program:
    """Decoded machine code; an instruction's index is its byte offset / 4.

    Attributes:
        table: [words] INSTRUCTION; operation 0 where nothing could be decoded.
        names: the operation of each, or why it could not be decoded; empty within an instruction.
        cross: [controls] CROSS, the DPP controls that occur.
        hits: [words] how often each was executed.
    """

    table: np.ndarray
    names: list[str]
    cross: np.ndarray
    hits: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.hits = np.zeros(len(self.table), np.uint64)

    @classmethod
    def of(cls, code: bytes) -> Program:
        """Decode from the first byte to the last."""
        words = len(code) // 4
        table = np.zeros(words, INSTRUCTION)
        names = [""] * words
        controls: dict[tuple[int, ...], int] = {}
        at = 0
        while at < words:
            try:
                operation, fields, size = decode(code[4 * at : 4 * at + 16])
                number = operations()[operation]
            except (Unsupported, KeyError) as error:
                names[at] = f"unsupported: {error}"
                at += 1
                continue
            names[at] = operation
            behind = at + size // 4
            _fill(table[at], number, {**DEFAULTS, **fields}, controls, behind)
            at = behind
        cross = np.zeros(max(len(controls), 1), CROSS)
        for control, number in controls.items():
            cross[number]["from"], cross[number]["writes"] = cross_lanes(*control)
        return cls(table, names, cross)

    def view(self, removed_barrier: int = -1) -> ProgramView:
        """What wave.c takes; valid as long as this program."""
        return ProgramView(
            self.table.ctypes.data, self.cross.ctypes.data, self.hits.ctypes.data, removed_barrier
        )

    def indices(self, operation: str) -> list[int]:
        """Where an operation stands."""
        return [at for at, name in enumerate(self.names) if name == operation]


def _fill(
    row: np.void, number: int, fields: dict[str, object], controls: dict, behind: int
) -> None:
    control = fields.pop("cross")
    row["cross"] = -1 if control is None else controls.setdefault(control, len(controls))
    row["operation"], row["next"] = number, behind
    for name, value in fields.items():
        row[name] = value
    if "BRANCH" in _name(number):
        row["offset"] += behind


@functools.cache
def _name(number: int) -> str:
    return next(name for name, n in operations().items() if n == number)
