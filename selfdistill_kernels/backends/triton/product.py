"""dH and dW of a slab when only the device knows how many rows carry a gradient.

A library GEMM takes its sizes from the host. Behind an advantage mask that would mean reading the
count back, or multiplying all N rows, zeros included (docs/gpu-evidence.md compares the three on
paper). These two products read the count from device memory and stop there. Where no mask stands
between, rows are dense and the library is used (backend.py).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.launch import Launch
from selfdistill_kernels.backends.triton.plan import Configuration, Machine, group_rows
from selfdistill_kernels.backends.triton.problem import dot_precision, fits_descriptor, operand
from selfdistill_kernels.backends.triton.tiles import load_tile, parts, work_item


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["rows", "inner", "group_rows"])
def product_kernel(
    left, right, count, to, scale,
    rows, columns, inner, left_stride, group_rows,
    TRANSPOSED: tl.constexpr, ACCUMULATE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INNER: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """to = left right or left^T right; persistent programs, one output tile an item.

    dH (TRANSPOSED False): left dz [capacity, inner], right W [inner, columns], to [capacity,
    columns] float32, += with ACCUMULATE; row blocks past the count are left alone.
    dW (TRANSPOSED True): left dz [capacity, rows], right h [capacity, columns], to [rows, columns];
    the sum stops at the count: rows of dz in its last block are zero, `inner` is the capacity.
    scale [1] or None multiplies the result. Each element is written once, by one program.
    """
    WIDTH: tl.constexpr = BLOCK_COLUMNS // PARTS
    limit = tl.load(count).to(tl.int32)
    if TRANSPOSED:
        row_blocks = tl.cdiv(rows, BLOCK_ROWS)
        depth = limit
    else:
        row_blocks = tl.cdiv(limit, BLOCK_ROWS)
        depth = inner
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    for item in range(tl.program_id(0), row_blocks * tiles, tl.num_programs(0)):
        row_block, tile = work_item(item, row_blocks, tiles, group_rows)
        first_row = row_block * BLOCK_ROWS
        first_column = tile * BLOCK_COLUMNS
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for k in range(0, depth, BLOCK_INNER):
            if TRANSPOSED:
                a = load_tile(
                    left, k, first_row, inner, rows, left_stride, BLOCK_INNER, BLOCK_ROWS,
                    DESCRIPTORS, EVEN,
                ).T  # fmt: skip
            else:
                a = load_tile(
                    left, first_row, k, rows, inner, left_stride, BLOCK_ROWS, BLOCK_INNER,
                    DESCRIPTORS, EVEN,
                )  # fmt: skip
            b = load_tile(
                right, k, first_column, inner, columns, columns, BLOCK_INNER, BLOCK_COLUMNS,
                DESCRIPTORS, EVEN,
            )  # fmt: skip
            total = tl.dot(a, b, total, input_precision=PRECISION)
        row = first_row + tl.arange(0, BLOCK_ROWS)
        pieces = parts(total, PARTS)
        for part in tl.static_range(PARTS):
            value = pieces[part]
            if scale is not None:
                value *= tl.load(scale)
            column = first_column + part * WIDTH + tl.arange(0, WIDTH)
            at = to + row[:, None].to(tl.int64) * columns + column[None, :]
            inside = (row[:, None] < rows) & (column[None, :] < columns)
            if ACCUMULATE:
                value += tl.load(at, mask=inside, other=0.0)
            tl.store(at, value.to(to.dtype.element_ty), mask=inside)


def hidden_product(
    machine: Machine, tile: Configuration, launch: Launch, dz: Tensor, head: Tensor,
    count: Tensor, to: Tensor, *, add: bool,
) -> None:  # fmt: skip
    """to[:count] (+)= dz head: dz [capacity, slab], head [slab, H], to [capacity, H] float32."""
    _product(
        machine, tile, launch, dz, head, count, to, None,
        rows=dz.shape[0], inner=dz.shape[1], transposed=False, add=add,
    )  # fmt: skip


def weight_product(
    machine: Machine, tile: Configuration, launch: Launch, dz: Tensor, hidden: Tensor,
    count: Tensor, to: Tensor, scale: Tensor | None,
) -> None:  # fmt: skip
    """to = scale dz[:count]^T hidden[:count]: dz [capacity, slab], hidden [capacity, H], to
    [slab, H] in its own dtype, scale [1] float32 or None."""
    _product(
        machine, tile, launch, dz, hidden, count, to, scale,
        rows=dz.shape[1], inner=dz.shape[0], transposed=True, add=False,
    )  # fmt: skip


def _product(
    machine: Machine, tile: Configuration, launch: Launch, left: Tensor, right: Tensor,
    count: Tensor, to: Tensor, scale: Tensor | None,
    *, rows: int, inner: int, transposed: bool, add: bool,
) -> None:  # fmt: skip
    columns = right.shape[1]
    left_block = [tile.inner, tile.rows] if transposed else [tile.rows, tile.inner]
    descriptors = machine.descriptors and fits_descriptor(left) and fits_descriptor(right)
    programs = machine.multiprocessors * tile.resident
    depth_bytes = inner * left.element_size()
    arguments: dict[str, Any] = {
        "left": operand(left, left_block, descriptors),
        "right": operand(right, [tile.inner, tile.columns], descriptors),
        "count": count,
        "to": to,
        "scale": scale,
        "rows": rows,
        "columns": columns,
        "inner": inner,
        "left_stride": left.stride(0),
        "group_rows": group_rows(machine, tile, depth_bytes, depth_bytes, programs),
    }
    launch(
        product_kernel,
        min(programs, -(-rows // tile.rows) * -(-columns // tile.columns)),
        tile,
        arguments,
        {
            "TRANSPOSED": transposed,
            "ACCUMULATE": add,
            "DESCRIPTORS": descriptors,
            "EVEN": left.shape[1] % left_block[1] == 0 and columns % tile.columns == 0,
            "PRECISION": dot_precision(),
            "BLOCK_ROWS": tile.rows,
            "BLOCK_COLUMNS": tile.columns,
            "BLOCK_INNER": tile.inner,
            "PARTS": tile.parts,
        },
    )
