"""Would specialised warps help the sweep? Machine code of the shipped kernel and of variants.

    python -m benchmarks.specialized --target sm_90 --target sm_100
    python -m benchmarks.specialized --target sm_90 --loop 'gluon, cluster of 2'
    python -m benchmarks.specialized --target sm_100 --loop tiles --tile 128,64,64,4,8,3

Compiles the sweep of a dense forward KL as the audit does, which needs no GPU: as shipped, once for
each loop that can be marked `warp_specialize=True`, and for sm_90 as benchmarks/hopper writes it in
Gluon, alone and in clusters of two. Counts instructions loop by loop in the SASS. Nothing is timed;
docs/gpu-design.md says what followed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.hopper.kernel import PARTS
from benchmarks.hopper.sweep import ARCHITECTURE, STAGES, Form, compiled_for
from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.triton.plan import SHIPPED, Configuration
from selfdistill_kernels.backends.triton.sweep import sweep_kernel
from selfdistill_kernels.backends.triton.tiles import score_tiles
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.tools.audit.build import TENSOR, compile_job, machine_code
from selfdistill_kernels.tools.audit.record import MACHINES, Job, Variant, jobs

TOKENS, HIDDEN, VOCABULARY = 8192, 4096, 128256
# Each loop: the function that has it, its text, and what it reads when it is marked.
LOOPS: dict[str, tuple[Any, str]] = {
    "hidden": (score_tiles, "range(0, size, BLOCK_HIDDEN)"),
    "tiles": (sweep_kernel, "range(first_tile, tl.minimum(first_tile + piece_tiles, tiles))"),
    "items": (sweep_kernel, "range(tl.program_id(0), row_blocks * pieces, tl.num_programs(0))"),
}
PLAIN = Variant(Objective("forward_kl", policy_gradient=1.0))
# Written with specialised warps, for sm_90 only: programs of a cluster.
WRITTEN: dict[str, int] = {"gluon": 1, "gluon, cluster of 2": 2}
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?0x([0-9a-f]+)")
SPILL = re.compile(r"\b(?:STL|LDL)\b")
# A multiprocessor of sm_90: flop a clock of its matrix units, bytes a clock of its shared memory.
PEAK_CLOCK, SHARED_BYTES_CLOCK = 4096, 128
WAIT = 8  # instructions: a shorter loop waits for a barrier
HEADER = (
    "| target | marked loop | tile | warps | registers | stack | shared KiB | spill instructions "
    "| partitions | loops: instructions (matrix) |"
)


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code: everything between a backward branch and its target.

    Attributes:
        start, stop: addresses of its first and last instruction.
        instructions: without those of loops inside of it.
        tensor: matrix instructions among them.
        depth: loops around it.
    """

    start: int
    stop: int
    instructions: int
    tensor: int
    depth: int

    def __str__(self) -> str:
        return f"{'>' * self.depth}{self.instructions} ({self.tensor})"


def loops(sass: str) -> list[Loop]:
    """The loops of `cuobjdump -sass`, by address."""
    listing = [(int(address, 16), text) for address, text in INSTRUCTION.findall(sass)]
    spans: dict[int, int] = {}
    for address, text in listing:
        target = BRANCH.search(text)
        if target and int(target[1], 16) < address:
            start = int(target[1], 16)
            spans[start] = max(address, spans.get(start, 0))
    # Waits are laid out behind the code and jump back into it: no loops, and they cross loops.
    spans = {
        start: stop
        for start, stop in spans.items()
        if not any(a < start <= b < stop for a, b in spans.items())
    }
    return [_loop(start, spans, listing) for start in sorted(spans)]


def _loop(start: int, spans: dict[int, int], listing: Sequence[tuple[int, str]]) -> Loop:
    stop = spans[start]
    others = [(a, b) for a, b in spans.items() if a != start]
    inner = [(a, b) for a, b in others if start <= a and b <= stop]
    own = [
        text
        for address, text in listing
        if start <= address <= stop and not any(a <= address <= b for a, b in inner)
    ]
    tensor = sum(bool(TENSOR.search(text)) for text in own)
    return Loop(start, stop, len(own), tensor, sum(a <= start and stop <= b for a, b in others))


@contextmanager
def marked(name: str) -> Iterator[None]:
    """The kernel with one loop specialised.

    Raises:
        ValueError: the loop is written otherwise by now.
    """
    function, text = LOOPS[name]
    kernel, source = sweep_kernel.src, function.src
    if source.count(text) != 1:
        raise ValueError(f"the loop over {name} no longer reads {text!r}")
    # A kernel keeps its hash, which has to be made anew when a function that it calls changes.
    sweep_kernel._unsafe_update_src(kernel)
    function._unsafe_update_src(source.replace(text, f"tl.{text[:-1]}, warp_specialize=True)"))
    try:
        yield
    finally:
        sweep_kernel._unsafe_update_src(kernel)
        function._unsafe_update_src(source)


def sweep_job(architecture: str, tile: Configuration | None) -> Job:
    """The sweep of a dense forward KL in bfloat16 as the audit compiles it, None: shipped tile."""
    shipped = SHIPPED[architecture]["sweep"]
    SHIPPED[architecture]["sweep"] = tile or shipped
    try:
        made = jobs(architecture, "bf16", (HIDDEN,), (PLAIN,))
    finally:
        SHIPPED[architecture]["sweep"] = shipped
    return next(job for job in made if job.name == "sweep")


def attainable(statistics: int, stages_ahead: int = 0, hidden: int = HIDDEN) -> float:
    """Share of sm_90's matrix peak that counted instructions leave a sweep in tiles of 128 x 128.

    A step of 64 along H brings 48 KiB into shared memory, from where both consumers read their
    operands (64 x 16 and 128 x 16 for each m64n128k16): 144 KiB for 1,024 clocks of the matrix
    units, more than the 128 bytes a clock that shared memory moves. Then 8 warps on 4 schedulers
    issue their statistics, one instruction a clock, beside what the other consumer still multiplies
    alone. Not in it: latencies, the L2 cache, power.

    Args:
        statistics: instructions a warp between two products.
        stages_ahead: steps of the product that one consumer may be behind the other.
    """
    step, step_bytes = 2 * 2 * 128 * 128 * 64 / PEAK_CLOCK, (48 + 2 * 2 * 4 * 6) * 1024
    steps = hidden / 64
    product = steps * max(step, step_bytes / SHARED_BYTES_CLOCK)
    waiting = max(2 * statistics - stages_ahead * step / 2, 0.0)
    return steps * step / (product + waiting)


def plain_inputs(vocabulary: int = VOCABULARY) -> LinearInputs:
    """A dense bfloat16 problem that holds no data."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    return LinearInputs(
        student_hidden=empty(TOKENS, HIDDEN),
        teacher_hidden=empty(TOKENS, HIDDEN),
        weight=empty(vocabulary, HIDDEN),
        teacher_weight=None,
        bias=None,
        teacher_bias=None,
        targets=torch.empty(TOKENS, dtype=torch.int64, device="meta"),
        exists=None,
        transform=LogitTransform(),
    )


def row(architecture: str, name: str, tile: Configuration | None) -> str:
    """What one variant compiles to, as a line of the table."""
    shape, compile_variant = _variant(architecture, name, tile)
    cells = [architecture, name, shape]
    try:
        compiled = compile_variant()
    except Exception as error:  # a variant that does not compile is a line of the table
        first = str(error).strip().splitlines() or [repr(error)]
        return "| " + " | ".join([*cells, f"does not compile: {first[0]}"]) + " |"
    usage, sass = machine_code(compiled)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ir = compiled.asm["ttgir"]
    kept = [loop for loop in loops(sass) if loop.instructions > WAIT or loop.tensor]
    cells += [
        str(compiled.metadata.num_warps),
        str(found["REG"]),
        str(found["STACK"] + found["LOCAL"]),
        f"{compiled.metadata.shared / 1024:.0f}",
        str(len(SPILL.findall(sass))),
        str(len(re.findall(r"^\s+(?:default|partition\d+)\b", ir, re.MULTILINE))),
        ", ".join(map(str, kept)),
    ]
    return "| " + " | ".join(cells) + " |"


def _variant(
    architecture: str, name: str, tile: Configuration | None
) -> tuple[str, Callable[[], Any]]:
    """Its tile in words, and what compiles it."""
    if name in WRITTEN:
        cluster = WRITTEN[name]

        def compile_written() -> Any:
            machine = MACHINES[architecture]
            return compiled_for(plain_inputs(), PLAIN.objective, machine, Form(cluster))

        return f"{128 * cluster}x128x64x{PARTS.value}, {STAGES} stages", compile_written
    job = sweep_job(architecture, tile)
    constants = dict(job.constants)
    shape = "x".join(
        str(constants[key]) for key in ("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_HIDDEN", "PARTS")
    )

    def compile_marked() -> Any:
        with marked(name) if name in LOOPS else nullcontext():
            return compile_job(job, architecture)

    return f"{shape}, {job.shape.stages} stages", compile_marked


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.specialized",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", choices=("sm_90", "sm_100"), action="append", help="default: both")
    add("--loop", choices=("none", *LOOPS, *WRITTEN), action="append", help="default: all")
    add("--tile", help="rows,columns,inner,parts,warps,stages; default: shipped")
    options = parser.parse_args(arguments)
    tile = None
    if options.tile is not None:
        rows, columns, inner, parts, warps, stages = map(int, options.tile.split(","))
        tile = Configuration(rows, columns, inner, parts, warps, stages, thrifty=True)
    print(f"triton {triton.__version__}, H = {HIDDEN}\n\n{HEADER}")
    print("|---" * (HEADER.count(" | ") + 1) + "|", flush=True)
    for architecture in options.target or ("sm_90", "sm_100"):
        written = WRITTEN if architecture == ARCHITECTURE else ()
        for name in options.loop or ("none", *LOOPS, *written):
            print(row(architecture, name, tile), flush=True)


if __name__ == "__main__":
    main()
