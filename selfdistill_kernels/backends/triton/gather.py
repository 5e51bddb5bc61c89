"""Rows by index, with a cast: compacts hidden states, and spreads dH back over the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.launch import Launch, Warps

WARPS = Warps(4)


@triton.jit
def gather_kernel(source, index, to, columns, scale, BLOCK: tl.constexpr):
    """to[i] = source[index[i]] * scale[0], or 0 where index[i] < 0; one program a row.

    source [m, columns], index [n] int64, to [n, columns], scale [1] float32 or None.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(index + row)
    present = tl.where(place >= 0, columns, 0)
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(source + place * columns + column, mask=column < present, other=0.0)
        if scale is not None:
            value = value.to(tl.float32) * factor
        tl.store(to + row * columns + column, value.to(to.dtype.element_ty), mask=column < columns)


def gather_rows(
    source: Tensor,
    index: Tensor,
    dtype: torch.dtype,
    launch: Launch,
    scale: Tensor | None = None,
) -> Tensor:
    """[n, columns] in `dtype`: rows of source [m, columns] at index [n], zeros where it is < 0."""
    columns = source.shape[1]
    to = torch.empty((index.numel(), columns), dtype=dtype, device=source.device)
    launch(
        gather_kernel,
        index.numel(),
        WARPS,
        {"source": source, "index": index, "to": to, "columns": columns, "scale": scale},
        {"BLOCK": min(2048, triton.next_power_of_2(columns))},
    )
    return to
