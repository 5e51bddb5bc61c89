"""What warp-specialised kernels would cost, on paper: the design of docs/gpu-design.md, no code.

The terms are those of cost.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from benchmarks import cost
from benchmarks.cost import Cost, Gpu, Size, Step

# Columns of dH that one program makes, and programs of a cluster that share what one converted.
PRODUCT_COLUMNS, CLUSTER = 256, 8
# Share of the columns that a block of 128 rows keeps at a gradient tolerance of 2e-3: between the
# 14 % measured at 4.1e-3 and the 26 % at 1.3e-3 (one model of 135 million parameters).
KEPT_COLUMNS = 0.21
# Fraction of a dense specialised GEMM's speed that one over gathered rows reaches; assumed.
GATHERED = 0.7
# An emitted entry: column, gradient, and the lot drawn for it.
ENTRY_BYTES = 12
# Entries of a row that are emitted at 2e-3, from the same measurement.
ENTRIES = 1200


def _specialised_sweep(size: Size, gpu: Gpu, written: float) -> Step:
    step = cost.sweep(size, gpu)
    return replace(step, kind="specialised", bytes=step.bytes + written)


def dense(size: Size, gpu: Gpu, *, trained: bool = True, in_product: bool = True) -> Cost:
    """4 GEMMs, 3 with a frozen head: the sweep leaves the float32 logits of both models behind.

    Args:
        trained: whether dW is wanted.
        in_product: the product that makes dH turns logits into dz on its way, once for each
            cluster of its columns, and writes dz for dW; else a kernel of its own does, which
            nothing hides.
    """
    pair = size.models * cost.FLOAT32 * size.logits
    dz = size.itemsize * size.logits
    row_bytes = size.vocabulary * (size.models * cost.FLOAT32 + size.itemsize)
    tiles = math.ceil(size.tokens / max(cost.STORE_BYTES // row_bytes, 1))
    rows = math.ceil(size.tokens / tiles)
    steps = [_specialised_sweep(size, gpu, pair + (tiles - 1) * size.head_bytes)]
    product_bytes = dz + tiles * size.head_bytes + size.hidden_bytes
    if in_product:
        product_bytes += pair * math.ceil(size.hidden / (PRODUCT_COLUMNS * CLUSTER))
    else:
        steps.append(Step("rows", "rows", 0.0, pair + dz, tiles))
    steps.append(Step("dH", "specialised", size.gemm, product_bytes, tiles))
    dw = cost.FLOAT32 * float(size.vocabulary * size.hidden)
    if trained:
        moved = dz + size.hidden_bytes + dw * max(2 * tiles - 1, 1) + dw + size.head_bytes
        steps.append(Step("dW", "specialised", size.gemm, moved, tiles + 1))
    return Cost(tuple(steps), float(rows * row_bytes) + (dw if trained else 0.0))


def tolerant(
    size: Size,
    gpu: Gpu,
    *,
    kept: float = KEPT_COLUMNS,
    trained: bool = True,
    recomputed: bool = False,
) -> Cost:
    """2 + 2 kept GEMMs over GATHERED (frozen: 2 + kept): the sweep emits the entries that count.

    Args:
        kept: share of the columns that a block of rows keeps.
        trained: whether dW is wanted.
        recomputed: logits of kept columns are made again, 2 kept more, instead of emitted.
    """
    entries = float(ENTRY_BYTES * ENTRIES * size.tokens)
    units = 1 + trained + (size.models if recomputed else 0)
    moved = 2 * entries + size.hidden_bytes + size.head_bytes * (1 + trained)
    product = Step("kept columns", "specialised", units * kept / GATHERED * size.gemm, moved, 4)
    return Cost((_specialised_sweep(size, gpu, entries), product), 2 * entries)


@dataclass(frozen=True)
class Way:
    """A way to do it; cost takes Size, Gpu and trained."""

    name: str
    label: str
    cost: Callable[..., Cost]


WAYS = (
    Way("rows", "rows apart", partial(dense, in_product=False)),
    Way("dense", "dense", dense),
    Way("recomputed", "2e-3, recomputed", partial(tolerant, recomputed=True)),
    Way("tolerant", "2e-3, emitted", tolerant),
)
