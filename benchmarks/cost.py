"""What a loss costs on a GPU, on paper: flops, bytes of DRAM, predicted seconds.

Everything here is a prediction. An algorithm is a list of steps; a step takes the longer of its
arithmetic and its DRAM traffic, and every launch costs the host a fixed time that nothing hides:

    seconds = sum over steps of  max(flops / (fraction * peak), bytes / (fraction * bandwidth))
                                 + launches * LAUNCH_SECONDS

Terms, for N tokens, hidden size H, vocabulary V, e bytes an element and m models that are scored:

- *GEMM*: 2 * rows * columns * inner flops. A library GEMM reads its operands and writes its result
  once: at these sizes it is bound by arithmetic, so what it re-reads through the cache is left
  out.
- *Head reads*: a fused sweep walks the vocabulary once for a group of R tokens whose hidden states
  stay in the cache, so DRAM delivers the head ceil(N / R) times and each hidden state once. R, like
  the pieces of the vocabulary, is that of the kernels' own plan (backends/triton/plan.py).
- *Tiles of logits*: `store`, chunks and tiles write float32 logits and read them back; the fused
  sweep keeps them in registers and writes only dz, once, for the gradient GEMMs.
- *Launches*: LAUNCH_SECONDS each.

What the model leaves out: L2 bandwidth, wave quantisation, clock throttling, the allocator. They
are inside the achieved fractions: what others measured of their kernels where somebody published
it, assumptions elsewhere (`Gpu.reached`).

Warp-specialised kernels, which are a design and no code, have their formulas in design.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from selfdistill_kernels.backends.triton.plan import (
    SHIPPED,
    SLAB_COLUMNS,
    STORE_BYTES,
    Configuration,
    Machine,
    SweepPlan,
)
from selfdistill_kernels.tools.audit.record import MACHINES

# A kernel launch from a Python host loop that runs ahead of the GPU; assumed.
LAUNCH_SECONDS = 4e-6
# Of a row: its state after one piece of the vocabulary, and its finished statistics.
STATE_BYTES = 44
STATISTICS_BYTES = 40

FLOAT32 = 4

Kind = Literal["library", "fused", "specialised", "rows"]


@dataclass(frozen=True)
class Gpu:
    """One accelerator, from its vendor's data sheet, and what software is assumed to reach of it.

    Attributes:
        name: also looked for in the name that the driver gives.
        peak: dense 16-bit tensor-core flop/s (no sparsity).
        bandwidth: of DRAM, bytes/s.
        machine: what the kernels' plan knows of it: multiprocessors, usable cache.
        tile: of the sweep.
        library, fused: fraction of `peak` that library GEMMs and Triton's GEMMs reach.
        streaming: fraction of `bandwidth` that a kernel reaches; assumed.
        source: which data sheet.
        reached: where `library`, `fused` and `specialised` come from.
        specialised: fraction of `peak` that others' warp-specialised kernels reach; None where
            there is no such hardware, or no figure.
    """

    name: str
    peak: float
    bandwidth: float
    machine: Machine
    tile: Configuration
    library: float
    fused: float
    streaming: float
    source: str
    reached: str = "assumed"
    specialised: float | None = None

    def fraction(self, kind: Kind) -> float:
        """The fraction of `peak` that GEMMs of this kind reach.

        Raises:
            ValueError: specialised kernels on a GPU without them.
        """
        if kind == "specialised":
            if self.specialised is None:
                raise ValueError(f"{self.name}: no figure of a warp-specialised kernel")
            return self.specialised
        return self.fused if kind == "fused" else self.library


def _gpu(
    name: str, architecture: str, *, source: str, reached: str = "assumed", **figures: float
) -> Gpu:
    machine, tile = MACHINES[architecture], SHIPPED[architecture]["sweep"]
    return Gpu(name=name, machine=machine, tile=tile, source=source, reached=reached, **figures)


# 728 TFLOP/s: three bare GEMMs at 8192/4096/151936 take 42 ms on an H100 (trl #7244). 511: verl's
# fused cross entropy, a Triton kernel without specialised warps, on an H200 (Liger-Kernel #1422).
# 811: quack's cross entropy on a Hopper; CuTe's, cuTile's and Liger's there 740 to 763 (#1356).
_HOPPER = "others' kernels on Hopper: 728, 511 and 811 TFLOP/s"
# 1,475 TFLOP/s: Liger's CuTe cross entropy (Liger-Kernel #1339). A library is at least as fast.
_BLACKWELL = "library, specialised: Liger's CuTe kernel, 1,475 TFLOP/s; fused: assumed"


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu(
            "A100", "sm_80", peak=312e12, bandwidth=2.039e12,
            library=0.80, fused=0.65, streaming=0.85, source="NVIDIA A100 SXM 80 GB",
        ),
        _gpu(
            "H100", "sm_90", peak=989e12, bandwidth=3.35e12,
            library=0.74, fused=0.52, specialised=0.82, streaming=0.85,
            source="NVIDIA H100 SXM", reached=_HOPPER,
        ),
        _gpu(
            "H200", "sm_90", peak=989e12, bandwidth=4.8e12,
            library=0.74, fused=0.52, specialised=0.82, streaming=0.85,
            source="NVIDIA H200 SXM", reached=_HOPPER,
        ),
        _gpu(
            "B200", "sm_100", peak=2250e12, bandwidth=8.0e12,
            library=0.65, fused=0.45, specialised=0.65, streaming=0.85,
            source="NVIDIA HGX B200; its L2 as drivers report it", reached=_BLACKWELL,
        ),
        _gpu(
            "MI300X", "gfx942", peak=1307e12, bandwidth=5.3e12,
            library=0.50, fused=0.40, streaming=0.80,
            source="AMD Instinct MI300X; its cache is the Infinity Cache",
        ),
    )
}  # fmt: skip


def gpu_named(device_name: str) -> Gpu | None:
    """The GPU of a driver's name such as "NVIDIA H100 80GB HBM3", None for an unknown one.

    A PCIe card of the same chip has other peaks and is unknown.
    """
    if "PCIe" in device_name or "NVL" in device_name:
        return None
    words = device_name.replace("-", " ").split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


@dataclass(frozen=True)
class Size:
    """N tokens, hidden size H, vocabulary V of a problem in bfloat16 or float16.

    Attributes:
        models: 2 with a teacher, 1 for a loss of the student alone.
        itemsize: bytes of an element of hidden states and head.
    """

    tokens: int
    hidden: int
    vocabulary: int
    models: int = 2
    itemsize: int = 2

    @property
    def head_bytes(self) -> float:
        """Of the lm_head, V H e."""
        return float(self.vocabulary * self.hidden * self.itemsize)

    @property
    def hidden_bytes(self) -> float:
        """Of the hidden states of one model, N H e."""
        return float(self.tokens * self.hidden * self.itemsize)

    @property
    def logits(self) -> float:
        """Their number, N V."""
        return float(self.tokens * self.vocabulary)

    @property
    def gemm(self) -> float:
        """2 N H V flops, the unit U of docs/math.md."""
        return 2.0 * self.logits * self.hidden

    def active(self, rho: float) -> int:
        """The tokens that carry a gradient, rho N.

        Raises:
            ValueError: rho outside [0, 1].
        """
        if not 0.0 <= rho <= 1.0:
            raise ValueError(f"rho: expected a share in [0, 1], got {rho}")
        return round(rho * self.tokens)


@dataclass(frozen=True)
class Step:
    """Kernels of one kind: what they compute, what they move, how often they are launched."""

    name: str
    kind: Kind
    flops: float
    bytes: float
    launches: int = 1

    def seconds(self, gpu: Gpu) -> float:
        """Predicted."""
        arithmetic = self.flops / (gpu.fraction(self.kind) * gpu.peak)
        return (
            max(arithmetic, self.bytes / (gpu.streaming * gpu.bandwidth))
            + self.launches * LAUNCH_SECONDS
        )


@dataclass(frozen=True)
class Cost:
    """Steps of an algorithm and the bytes that it needs beyond inputs and gradients."""

    steps: tuple[Step, ...]
    workspace: float

    @property
    def flops(self) -> float:
        return sum(step.flops for step in self.steps)

    @property
    def bytes(self) -> float:
        return sum(step.bytes for step in self.steps)

    @property
    def intensity(self) -> float:
        """Flops per byte of DRAM traffic."""
        return self.flops / self.bytes

    def seconds(self, gpu: Gpu) -> float:
        """Predicted."""
        return sum(step.seconds(gpu) for step in self.steps)


# ---- our algorithms ------------------------------------------------------------------------------


def sweep_plan(size: Size, gpu: Gpu) -> SweepPlan:
    """How the kernels would walk this size on that GPU."""
    row_bytes = size.hidden * size.itemsize
    return SweepPlan.choose(
        gpu.machine,
        gpu.tile,
        rows=size.tokens,
        vocabulary=size.vocabulary,
        row_bytes=size.models * row_bytes,
        head_row_bytes=row_bytes,
    )


def group_rows(size: Size, gpu: Gpu) -> int:
    """R, the tokens whose hidden states stay in the cache while the head streams past."""
    return sweep_plan(size, gpu).group_rows * gpu.tile.rows


def pieces(size: Size, gpu: Gpu) -> int:
    """Pieces of the vocabulary whose states are merged."""
    return sweep_plan(size, gpu).pieces


def sweep(size: Size, gpu: Gpu) -> Step:
    """Statistics of all tokens in one fused sweep: m U flops.

    bytes = ceil(N / R) V H e                 head, once a row group
          + m N H e                           hidden states, once
          + 2 * STATE_BYTES * N * pieces      states, written and merged
          + STATISTICS_BYTES * N
    """
    head_reads = math.ceil(size.tokens / group_rows(size, gpu))
    states = 2.0 * STATE_BYTES * size.tokens * pieces(size, gpu)
    moved = head_reads * size.head_bytes + size.models * size.hidden_bytes + states
    moved += STATISTICS_BYTES * size.tokens
    return Step("sweep", "fused", size.models * size.gemm, moved, launches=2)


def least_sweep_bytes(size: Size, gpu: Gpu) -> float:
    """Each hidden state once, and each head element once for as many hidden states as fill the
    whole cache, with no room for the head tiles in flight."""
    most = gpu.machine.cache_bytes / (size.models * size.hidden * size.itemsize)
    groups = math.ceil(size.tokens / max(most, 1.0))
    return groups * size.head_bytes + size.models * size.hidden_bytes


def sweep_and_gradient(
    size: Size,
    gpu: Gpu,
    *,
    rho: float = 1.0,
    trained: bool = True,
    sweeps: int = 1,
    compacted: bool | None = None,
) -> Cost:
    """The fused strategy: 2 + 4 rho GEMMs, 2 + 3 rho with a frozen head (m = 2).

    Of n = rho N active tokens, slab by slab of SLAB_COLUMNS = C columns: the pair of tiles again
    (2 m n C H flops) from the head slab, which DRAM delivers ceil(n / R) times, and the hidden
    states, writing dz [n, C] in 16 bits; then a GEMM for dH (reads dz and the head slab, adds to
    float32 dH [n, H]) and one for dW (reads dz and the hidden states, writes its slab once). What
    no token touches is still written: dW and dH are zeros at rho = 0.

    Args:
        rho: share of the tokens that carry a gradient.
        trained: whether dW is wanted.
        sweeps: 2 for the mixture divergences (JSD, skew), whose statistics need both normalisers.
        compacted: whether only the device knows n, so that GEMMs of our own stand in for the
            library's, which take n from the host; None: where rho < 1.
    """
    n, e, hidden, vocabulary = size.active(rho), size.itemsize, size.hidden, size.vocabulary
    steps = [sweep(size, gpu)] * sweeps
    written = size.hidden_bytes + (size.head_bytes if trained else 0.0)
    if n == 0:
        return Cost((*steps, Step("zeros", "rows", 0.0, written, 2)), 0.0)
    slabs = math.ceil(vocabulary / SLAB_COLUMNS)
    gemm = 2.0 * n * hidden * vocabulary
    dz = float(n * vocabulary * e)
    rows = float(n * hidden * e)
    group = group_rows(size, gpu)
    product: Kind = "fused" if (rho < 1.0 if compacted is None else compacted) else "library"
    steps += [
        Step("gather active rows", "rows", 0.0, 2 * size.models * rows, 4),
        Step(
            "gradient tiles",
            "fused",
            size.models * gemm,
            math.ceil(n / group) * size.head_bytes + slabs * size.models * rows + dz,
            slabs,
        ),
        Step(
            "dH",
            product,
            gemm,
            dz + size.head_bytes + slabs * 2.0 * FLOAT32 * n * hidden,
            slabs,
        ),
        Step("dH to 16 bits", "rows", 0.0, FLOAT32 * n * hidden + size.hidden_bytes, 2),
    ]
    if trained:
        steps.append(Step("dW", product, gemm, dz + slabs * rows + size.head_bytes, slabs))
    slab = min(SLAB_COLUMNS, vocabulary)
    return Cost(tuple(steps), float(n * slab * e) + FLOAT32 * n * hidden + size.models * rows)


def store(size: Size, gpu: Gpu, *, rho: float = 1.0, trained: bool = True) -> Cost:
    """Row tiles that span the vocabulary: 2 + 2 rho GEMMs, 2 + rho with a frozen head (m = 2).

    A tile of B tokens, as many as STORE_BYTES hold: library GEMMs write float32 logits (4 m B V);
    the row kernel reads them for the statistics and reads those of active rows again (a row of 2 V
    floats does not stay on chip) to write dz in 16 bits; active rows wait until B of them fill the
    GEMMs of dH and dW. dW accumulates in float32: written by the first of those GEMMs, read and
    written by the others, cast at the end.
    """
    del gpu  # the same on all: a tile is far larger than any cache
    n, e, hidden, vocabulary = size.active(rho), size.itemsize, size.hidden, size.vocabulary
    row_bytes = vocabulary * (size.models * FLOAT32 + e)
    tiles = math.ceil(size.tokens / max(STORE_BYTES // row_bytes, 1))
    rows = math.ceil(size.tokens / tiles)  # even tiles
    flushes = math.ceil(n / rows)
    logits = size.models * FLOAT32 * size.logits
    gemm = 2.0 * n * hidden * vocabulary
    dz, dw = float(n * vocabulary * e), FLOAT32 * float(vocabulary * hidden)
    steps = [
        Step(
            "logits",
            "library",
            size.models * size.gemm,
            logits + tiles * size.head_bytes + size.models * size.hidden_bytes,
            tiles,
        ),
        Step(
            "rows", "rows", 0.0, logits + rho * logits + dz + STATISTICS_BYTES * size.tokens, tiles
        ),
    ]
    if n:
        steps.append(
            Step(
                "dH",
                "library",
                gemm,
                dz + flushes * size.head_bytes + size.hidden_bytes,
                flushes,
            )
        )
    if trained:
        moved = dz + n * hidden * e + dw * max(2 * flushes - 1, 1) + dw + size.head_bytes
        steps.append(Step("dW", "library", gemm, moved, flushes + 1))
    return Cost(tuple(steps), float(rows * row_bytes) + (dw if trained else 0.0))


def break_even(size: Size, gpu: Gpu, *, rho: float, trained: bool = True) -> float:
    """The fraction of `peak` at which the fused strategy is as fast as `store`; above 1: never."""
    aim = store(size, gpu, rho=rho, trained=trained).seconds(gpu)
    low, high = 0.01, 1.01
    while high - low > 1e-4:
        middle = (low + high) / 2
        made = replace(gpu, fused=middle)
        slower = sweep_and_gradient(size, made, rho=rho, trained=trained).seconds(made) > aim
        low, high = (middle, high) if slower else (low, middle)
    return high


# ---- what others do ------------------------------------------------------------------------------

# DRAM bytes a logit of eager torch, forward and backward, besides the GEMMs: each operator reads
# its [N, V] inputs and writes its outputs once. Counted by running the code (tests/benchmarks).
EAGER_BYTES: dict[str, float] = {
    "forward_kl": 98.0,
    "reverse_kl": 122.0,
    "jsd": 274.0,
    "cross_entropy": 44.0,
}
# log_softmax of a row that fits no shared memory reads it three times, not once.
EXTRA_SOFTMAX_READS = 2


def floor(size: Size, *, trained: bool = True) -> Cost:
    """The bare library GEMMs: m for logits, dH and dW; 16-bit logits written and read."""
    gemms = size.models + 1 + trained
    logits = size.itemsize * size.logits
    moved = gemms * (logits + size.head_bytes + size.hidden_bytes)
    return Cost((Step("GEMMs", "library", gemms * size.gemm, moved, gemms),), logits)


def materialised(size: Size, objective: str, *, trained: bool = True) -> Cost:
    """Eager torch on whole [N, V] logits: the floor's GEMMs, EAGER_BYTES a logit between them."""
    gemms = floor(size, trained=trained)
    extra = EXTRA_SOFTMAX_READS * FLOAT32 * size.models
    between = (EAGER_BYTES[objective] + extra) * size.logits
    # Float32 log-probs of each model, their gradient, and temporaries of the loss.
    live = (2 * size.models + 3) * FLOAT32 * size.logits
    return Cost((*gemms.steps, Step("rows", "rows", 0.0, between, 20)), live)


def row_chunks(size: Size, *, rows: int, row_bytes: float, add_bytes: float, launches: int) -> Cost:
    """Chunks of rows, gradient made in the forward pass, dW always: m + 2 GEMMs.

    Args:
        rows: tokens in a chunk.
        row_bytes: DRAM bytes a logit between the GEMMs.
        add_bytes: bytes per element of dW that each chunk moves to accumulate it.
        launches: of row kernels, a chunk.
    """
    rows = min(rows, size.tokens)
    chunks = math.ceil(size.tokens / rows)
    logits, head = size.itemsize * size.logits, size.head_bytes
    add = chunks * add_bytes * size.vocabulary * size.hidden
    return Cost(
        (
            Step(
                "logits",
                "library",
                size.models * size.gemm,
                size.models * (logits + chunks * head + size.hidden_bytes),
                size.models * chunks,
            ),
            Step("rows", "rows", 0.0, row_bytes * size.logits, launches * chunks),
            Step("dH", "library", size.gemm, logits + chunks * head + size.hidden_bytes, chunks),
            Step("dW", "library", size.gemm, logits + size.hidden_bytes + add, chunks),
        ),
        (row_bytes / 2) * rows * size.vocabulary,
    )


def tiles(size: Size, *, rows: int, columns: int, sweeps: int = 1, trained: bool = True) -> Cost:
    """Tiles of rows x columns, swept for statistics and again for gradients: 2 + 4 GEMMs (m = 2),
    one less with a frozen head, whatever the mask drops.

    Library GEMMs write float32 tiles (4 m a logit) that a kernel reads; the gradient is written in
    float32, rounded to 16 bits, and multiplied; dH and dW accumulate in float32.

    Args:
        sweeps: of the forward pass, 2 for JSD.
    """
    rows, columns = min(rows, size.tokens), min(columns, size.vocabulary)
    down, across = math.ceil(size.tokens / rows), math.ceil(size.vocabulary / columns)
    count, models, logits = down * across, size.models, size.logits
    tile = models * FLOAT32 * logits
    scores = tile + models * (down * size.head_bytes + across * size.hidden_bytes)
    dz, dw = size.itemsize * logits, FLOAT32 * float(size.vocabulary * size.hidden)
    visits = sweeps + 1
    gradient_bytes = tile + (FLOAT32 + FLOAT32 + size.itemsize) * logits
    dh = FLOAT32 * float(size.tokens * size.hidden)
    steps = [
        Step("logits", "library", visits * models * size.gemm, visits * scores, visits * 2 * count),
        Step("rows", "rows", 0.0, sweeps * tile, sweeps * count),
        Step("gradient rows", "rows", 0.0, gradient_bytes, 2 * count),
        Step("dH", "library", size.gemm, dz + down * size.head_bytes + 2 * across * dh, count),
    ]
    if trained:
        moved = dz + across * size.hidden_bytes + (2 * down + 1) * dw + dw + size.head_bytes
        steps.append(Step("dW", "library", size.gemm, moved, count + 2))
    workspace = models * FLOAT32 * float(rows * columns) + (dw if trained else 0.0) + dh
    return Cost(tuple(steps), workspace)
