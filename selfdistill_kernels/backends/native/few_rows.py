"""A linear layer that reads few rows on a CPU, as when a model samples (csrc/cpu/few_rows.inl).

A library packs the weight before it multiplies, every time; that pays for many rows. Here the
weight is read once. What it saves is in docs/benchmarks.md, "One step of the trainer".
"""

from __future__ import annotations

from functools import cache
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from selfdistill_kernels.backends.native import extension

# Beyond these a library was measured to be as fast, with AVX-512 and with AVX2.
MOST_ROWS = 64


def reads_few_rows(x: Tensor, weight: Tensor) -> bool:
    """Return whether `few_rows_linear` computes x W^T here: float32 on a CPU, without gradient.

    Args:
        x: [rows, in].
        weight: [out, in].
    """
    return (
        0 < x.shape[0] <= MOST_ROWS
        and not torch.is_grad_enabled()
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not isinstance(weight, DTensor)
        and not torch.is_autocast_enabled("cpu")
        and is_built()
    )


@cache
def is_built() -> bool:
    """Return whether the compiled kernels are there."""
    return extension.load("_C", missing="install a C++ compiler") is None


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    down: Tensor | None = None,
    up: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Return x W^T + bias + scaling (x A^T) B^T, [rows, out] float32, without gradient.

    A row's numbers are the same bits whatever rows are beside it, on any number of threads.

    Args:
        x: [rows, in] that `reads_few_rows` admits.
        weight: [out, in].
        bias: [out].
        down, up: A [rank, in] and B [out, rank] of a LoRA adapter, both or neither.
        scaling: of the adapter.
    """
    product = torch.ops.selfdistill.few_rows_linear
    return cast(Tensor, product(x.contiguous(), weight, bias, down, up, scaling))
