"""Which tiles a GPU gets, how the sweep walks them, and what that costs in memory traffic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from selfdistill_kernels.backends.dispatch import (
    TRITON_AMD,
    TRITON_CAPABILITY,
    amd_problem,
    capability_problem,
)

MEBIBYTE = 1 << 20
# Columns that one work item sums in float32 before its state goes to the float64 merge. Few enough
# that the sums lose no digit that matters and that the last wave of items is short; many enough
# that the states (44 bytes a row and item) are a few percent of the traffic.
PIECE_COLUMNS = 4096
# Programs that share a head tile start together and do the same work; the cache is taken to hold
# this fraction of each tile in flight until the last of them has passed (an assumption).
HEAD_WINDOW = 1 / 4
MOST_PIECES = 256
# Width of a slab of dz: wide enough for the product GEMMs to run at full speed.
SLAB_COLUMNS = 8192
# `store` reads and writes all of dW once a tile of rows; below this many rows that traffic shows.
STORE_ROWS = 1024
STORE_BYTES = 2048 * MEBIBYTE

Kind = Literal["sweep", "mixture", "gradient", "product"]


@dataclass(frozen=True)
class Configuration:
    """Tile and compiler options of one GEMM kernel.

    Attributes:
        rows, columns, inner: the tile, and the step along the summed dimension.
        parts: pieces in which the accumulators are turned into statistics (tiles.parts).
        warps, stages: of Triton.
        resident: programs that share a multiprocessor.
        thrifty: instructions are scheduled for few live registers.
        max_registers: a bound that is given to the assembler. Without one it now and then spills a
            little to fit one program more; with one of 255 the sweep of sm_100 takes them all.
    """

    rows: int
    columns: int
    inner: int
    parts: int
    warps: int
    stages: int
    resident: int = 1
    thrifty: bool = False
    max_registers: int | None = None


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a GPU.

    Attributes:
        architecture: a key of SHIPPED.
        multiprocessors: their number.
        cache_bytes: L2 that one reader can count on (half of it where two halves mirror each
            other; of AMD's, half of the memory-side cache).
        descriptors: loads through tensor descriptors (TMA).
    """

    architecture: str
    multiprocessors: int
    cache_bytes: int
    descriptors: bool

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """The machine behind a device; the CPU stands for Triton's interpreter.

        Raises:
            RuntimeError: a GPU that no shipped configuration is for.
        """
        if device.type == "cpu":
            return INTERPRETER
        return _machine(torch.device(device.type, device.index or 0))


@cache
def _machine(device: torch.device) -> Machine:
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.partition(":")[0]
        if architecture not in TRITON_AMD:
            reason = amd_problem(architecture)
            raise RuntimeError(f"backend: 'triton' is not available: {reason}")
        return Machine(architecture, count, 128 * MEBIBYTE, descriptors=False)
    if (properties.major, properties.minor) < TRITON_CAPABILITY:
        reason = capability_problem((properties.major, properties.minor))
        raise RuntimeError(f"backend: 'triton' is not available: {reason}")
    capability = properties.major * 10 + properties.minor
    known = max(version for version in (80, 90, 100, 120) if version <= capability)
    return Machine(f"sm_{known}", count, properties.L2_cache_size // 2, descriptors=known >= 90)


def is_amd(architecture: str) -> bool:
    """Whether the name of an architecture is one of AMD's."""
    return architecture.startswith("gfx")


def lanes(architecture: str) -> int:
    """Lanes of a warp; AMD's data-centre GPUs have 64."""
    return 64 if architecture.startswith("gfx9") else 32


INTERPRETER = Machine("interpreter", 3, MEBIBYTE, descriptors=True)

_SMALL = Configuration(16, 64, 32, 2, 4, 2)
# Chosen by the audit (docs/gpu-evidence.md): the largest tiles without a spilled register. Those of
# sm_80 stay below the 99 KiB of shared memory of sm_86 and sm_89, which use them too.
SHIPPED: dict[str, dict[Kind, Configuration]] = {
    "sm_80": {
        "sweep": Configuration(128, 64, 64, 4, 8, 3),
        "mixture": Configuration(128, 64, 64, 2, 8, 3),
        "gradient": Configuration(128, 64, 64, 2, 8, 3),
        "product": Configuration(128, 128, 32, 4, 8, 3),
    },
    "sm_90": {
        "sweep": Configuration(128, 128, 64, 8, 8, 3),
        "mixture": Configuration(128, 128, 64, 4, 8, 3),
        "gradient": Configuration(128, 128, 64, 8, 8, 3),
        "product": Configuration(128, 256, 64, 4, 8, 3),
    },
    "sm_100": {
        "sweep": Configuration(128, 128, 64, 8, 8, 3, thrifty=True),
        "mixture": Configuration(128, 128, 64, 8, 8, 3, thrifty=True, max_registers=255),
        "gradient": Configuration(128, 128, 64, 8, 8, 3, thrifty=True, max_registers=255),
        "product": Configuration(128, 256, 64, 4, 8, 3, thrifty=True),
    },
    "sm_120": {
        "sweep": Configuration(128, 64, 64, 4, 8, 2, thrifty=True, max_registers=255),
        "mixture": Configuration(128, 64, 64, 4, 8, 2, thrifty=True, max_registers=255),
        "gradient": Configuration(128, 64, 64, 4, 8, 2, thrifty=True, max_registers=255),
        "product": Configuration(128, 128, 32, 4, 8, 3, thrifty=True, max_registers=255),
    },
    "gfx942": {
        "sweep": Configuration(64, 64, 64, 1, 4, 2),
        "mixture": Configuration(64, 64, 64, 4, 4, 2),
        "gradient": Configuration(64, 64, 64, 4, 4, 2),
        "product": Configuration(128, 128, 32, 4, 8, 2),
    },
}
# A mixture divergence, a temperature, a bias, a soft cap, a second head or a ragged vocabulary
# takes registers that cost half a tile.
HEAVY: dict[str, dict[Kind, Configuration]] = {
    "sm_80": {
        "sweep": Configuration(64, 64, 64, 4, 8, 3),
        "mixture": Configuration(64, 64, 64, 4, 8, 3),
        "gradient": Configuration(64, 64, 64, 4, 8, 3),
    },
    "sm_90": {
        "sweep": Configuration(64, 128, 64, 8, 8, 3),
        "mixture": Configuration(64, 128, 64, 8, 8, 3),
        "gradient": Configuration(64, 128, 64, 8, 8, 3),
    },
    "sm_100": {
        "sweep": Configuration(128, 64, 64, 2, 8, 3, thrifty=True),
        "mixture": Configuration(128, 64, 64, 8, 8, 3, thrifty=True, max_registers=255),
        "gradient": Configuration(128, 128, 64, 8, 8, 3, thrifty=True, max_registers=255),
    },
    "sm_120": {
        "sweep": Configuration(64, 64, 64, 2, 8, 2, thrifty=True, max_registers=255),
        "mixture": Configuration(64, 64, 64, 2, 8, 2, thrifty=True, max_registers=255),
        "gradient": Configuration(64, 64, 64, 2, 8, 2, thrifty=True, max_registers=255),
    },
    "gfx942": {
        "sweep": Configuration(64, 64, 64, 1, 4, 2),
        "mixture": Configuration(64, 64, 64, 4, 4, 2),
        "gradient": Configuration(64, 64, 64, 4, 4, 2),
    },
}
# gfx950 has more LDS and its kernels take more of it for the same tiles; no spill either.
SHIPPED["gfx950"] = SHIPPED["gfx942"]
HEAVY["gfx950"] = HEAVY["gfx942"]
# float32 inputs: twice the shared memory, and without tf32 no tensor cores to feed.
_FLOAT32 = Configuration(64, 64, 32, 2, 8, 2)


def configuration(
    machine: Machine, kind: Kind, itemsize: int, *, heavy: bool = False
) -> Configuration:
    """The shipped configuration of a kernel for inputs of 2 or 4 bytes.

    heavy: a mixture divergence, scale, temperature, bias, soft cap, two heads, or a vocabulary that
    ends within a tile.
    """
    if machine is INTERPRETER:
        return _SMALL
    if itemsize == 4:
        return _FLOAT32
    if heavy and kind != "product":
        return HEAVY[machine.architecture][kind]
    return SHIPPED[machine.architecture][kind]


def key_of(machine: Machine, kind: Kind, itemsize: int, *, heavy: bool) -> str:
    """Name of a kernel's tile in the file of tuned tiles."""
    return f"{machine.architecture} {kind} {itemsize} bytes{' heavy' if heavy else ''}"


@dataclass(frozen=True)
class SweepPlan:
    """How persistent programs walk [capacity rows, vocabulary] tiles.

    Attributes:
        programs: size of the grid.
        pieces, piece_tiles: the vocabulary is cut into `pieces` of `piece_tiles` column tiles.
        group_rows: row blocks whose hidden states share the cache while the head streams past.
    """

    programs: int
    pieces: int
    piece_tiles: int
    group_rows: int

    @classmethod
    def choose(
        cls,
        machine: Machine,
        tile: Configuration,
        *,
        rows: int,
        vocabulary: int,
        row_bytes: int,
        head_row_bytes: int,
    ) -> SweepPlan:
        """Choose.

        Args:
            machine, tile: where it runs and with which tile.
            rows: upper bound of the rows; vocabulary: entries of the head.
            row_bytes: hidden states of one row, all models.
            head_row_bytes: one vocabulary entry, all heads.
        """
        programs = machine.multiprocessors * tile.resident
        row_blocks = -(-rows // tile.rows)
        tiles = -(-vocabulary // tile.columns)
        per_program = -(-(tiles * row_blocks) // programs)
        piece_tiles = max(
            1, min(PIECE_COLUMNS // tile.columns, per_program), -(-tiles // MOST_PIECES)
        )
        pieces = -(-tiles // piece_tiles)
        return cls(
            programs=min(programs, row_blocks * pieces),
            pieces=pieces,
            piece_tiles=piece_tiles,
            group_rows=min(
                group_rows(machine, tile, row_bytes, head_row_bytes, programs), row_blocks
            ),
        )


def group_rows(
    machine: Machine, tile: Configuration, row_bytes: int, head_row_bytes: int, programs: int
) -> int:
    """Most row blocks g whose hidden states fit the cache beside the head tiles in flight.

    The hidden states of g row blocks stay; ceil(programs / g) pieces are swept at a time, each with
    HEAD_WINDOW of a head tile. At least 1.
    """
    block, head_tile = tile.rows * row_bytes, tile.columns * head_row_bytes
    fitting = [
        g
        for g in range(1, programs + 1)
        if g * block + HEAD_WINDOW * -(-programs // g) * head_tile <= machine.cache_bytes
    ]
    return max(fitting, default=1)


@dataclass(frozen=True)
class Traffic:
    """Predicted DRAM bytes of one sweep.

    Attributes:
        predicted: in the grouped order.
        minimum: each hidden state once, each head element once a group of rows.
    """

    predicted: int
    minimum: int


def sweep_traffic(
    machine: Machine,
    tile: Configuration,
    *,
    rows: int,
    vocabulary: int,
    row_bytes: int,
    head_row_bytes: int,
) -> Traffic:
    """DRAM traffic of a sweep; arguments as in SweepPlan.choose.

    predicted = hidden + groups * head + 2 * states: states are written and read once.
    minimum = hidden + groups * head with groups = ceil(row blocks / group_rows).
    """
    plan = SweepPlan.choose(
        machine, tile, rows=rows, vocabulary=vocabulary, row_bytes=row_bytes,
        head_row_bytes=head_row_bytes,
    )  # fmt: skip
    hidden, head = rows * row_bytes, vocabulary * head_row_bytes
    row_blocks = -(-rows // tile.rows)
    groups = -(-row_blocks // plan.group_rows)
    minimum = hidden + groups * head
    states = 44 * rows * plan.pieces
    return Traffic(minimum + 2 * states, minimum)


@dataclass(frozen=True)
class SlabPlan:
    """The gradient by recomputation: slabs of the vocabulary outermost.

    Attributes:
        columns: width of a slab of dz [capacity, columns] in the GEMM's dtype.
    """

    columns: int

    @classmethod
    def choose(
        cls, tile: Configuration, *, rows: int, vocabulary: int, itemsize: int, workspace: int
    ) -> SlabPlan:
        """The widest slab that `workspace` bytes of dz hold; with 0, the width that suits a GPU.

        Raises:
            ValueError: the workspace cannot hold one tile's columns for all rows.
        """
        columns = SLAB_COLUMNS
        if workspace:
            columns = min(columns, workspace // (max(rows, 1) * itemsize))
            columns -= columns % tile.columns
            if columns == 0:
                raise ValueError(
                    f"workspace: {workspace} bytes cannot hold a slab of gradients; {rows} tokens "
                    f"need at least {rows * itemsize * tile.columns} bytes on the triton backend"
                )
        return cls(min(columns, -(-vocabulary // tile.columns) * tile.columns))


def store_rows(
    *, rows: int, vocabulary: int, heads: int, itemsize: int, gated: bool, workspace: int
) -> int | None:
    """Rows of a `store` tile, or None where recomputation is the better way.

    A tile holds float32 logits of all models and, for 16-bit inputs, the gradient beside them.
    It pays (2 + 2 rho GEMMs against 2 + 4 rho) when most rows carry a gradient: not behind an
    advantage mask, whose rows are compacted on the device and skipped.
    """
    if gated or rows == 0:
        return None
    row = vocabulary * (4 * heads + (itemsize if itemsize < 4 else 0))
    fitting = min((workspace or STORE_BYTES) // row, rows)
    if fitting < min(STORE_ROWS, rows):
        return None
    tiles = -(-rows // fitting)
    return -(-rows // tiles)  # even tiles: no small last one
