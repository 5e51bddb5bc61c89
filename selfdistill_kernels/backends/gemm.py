"""The library GEMMs of the native backend: float32 logits and gradients from either input dtype."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# Columns of the head that are widened at a time: large enough for the GEMM, small beside a tile.
WIDENED_COLUMNS = 4096


class Head(Protocol):
    """The three products of a tile with the columns [start, stop) of an lm_head [V, H].

    Attributes:
        narrow_gradient: True when the products take the gradient of the logits in bfloat16, which
            the row kernels then write into the first half of each row.
    """

    narrow_gradient: bool

    def logits(self, hidden: Tensor, start: int, stop: int, *, out: Tensor) -> None:
        """out [r, c] float32 = hidden [r, H] weight[start:stop]^T."""
        ...

    def hidden_gradient(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        """Part of dH, [r, H] float32 = gradient [r, c] weight[start:stop]."""
        ...

    def weight_gradient(
        self, gradient: Tensor, hidden: Tensor, *, out: Tensor, add: Tensor | None
    ) -> None:
        """out [c, H] = gradient [r, c]^T hidden [r, H] (+ add [c, H] float32).

        `out` has the dtype of the head, or is float32; `add` may be `out` itself.
        """
        ...


class Float32Head:
    """torch.mm.

    Args:
        weight: [V, H] float32.
    """

    narrow_gradient = False

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def logits(self, hidden: Tensor, start: int, stop: int, *, out: Tensor) -> None:
        torch.mm(hidden, self.weight[start:stop].T, out=out)

    def hidden_gradient(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        return gradient @ self.weight[start:stop]

    def weight_gradient(
        self, gradient: Tensor, hidden: Tensor, *, out: Tensor, add: Tensor | None
    ) -> None:
        if add is None:
            torch.mm(gradient.T, hidden, out=out)
        else:
            torch.addmm(add, gradient.T, hidden, out=out)


class BrgemmHead:
    """bfloat16 products with float32 results (csrc/cpu/gemm.cpp), where the processor has them.

    The gradient of the logits is rounded to bfloat16 for its GEMMs, after it was made in float32;
    the results are rounded to the inputs' dtype anyway (docs/decisions.md).

    Args:
        weight: [V, H] bfloat16.
    """

    narrow_gradient = True

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def logits(self, hidden: Tensor, start: int, stop: int, *, out: Tensor) -> None:
        torch.ops.selfdistill.gemm_bf16_logits_(hidden, self.weight[start:stop], out)

    def hidden_gradient(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        size = (gradient.shape[0], self.weight.shape[1])
        out = gradient.new_empty(size, dtype=torch.float32)
        torch.ops.selfdistill.gemm_bf16_hidden_gradient_(
            gradient, self.weight[start:stop], False, out
        )
        return out

    def weight_gradient(
        self, gradient: Tensor, hidden: Tensor, *, out: Tensor, add: Tensor | None
    ) -> None:
        torch.ops.selfdistill.gemm_bf16_weight_gradient_(gradient, hidden, add, out)


class WideningHead:
    """float32 products of 16-bit inputs: columns of the head are widened on the way.

    Args:
        weight: [V, H] bfloat16.
    """

    narrow_gradient = False

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def logits(self, hidden: Tensor, start: int, stop: int, *, out: Tensor) -> None:
        wide = hidden.to(torch.float32)
        for low in range(start, stop, WIDENED_COLUMNS):
            high = min(low + WIDENED_COLUMNS, stop)
            part = self.weight[low:high].to(torch.float32)
            out[:, low - start : high - start] = wide @ part.T

    def hidden_gradient(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        total = gradient.new_zeros((gradient.shape[0], self.weight.shape[1]))
        for low in range(start, stop, WIDENED_COLUMNS):
            high = min(low + WIDENED_COLUMNS, stop)
            part = self.weight[low:high].to(torch.float32)
            total.addmm_(gradient[:, low - start : high - start], part)
        return total

    def weight_gradient(
        self, gradient: Tensor, hidden: Tensor, *, out: Tensor, add: Tensor | None
    ) -> None:
        wide = hidden.to(torch.float32)
        for low in range(0, gradient.shape[1], WIDENED_COLUMNS):
            part = slice(low, low + WIDENED_COLUMNS)
            made = gradient[:, part].T @ wide
            out[part] = made if add is None else made.add_(add[part])


class TensorCoreHead:
    """bfloat16 products with float32 results on a GPU: the library's float32 accumulators.

    As in BrgemmHead, the gradient of the logits is rounded once, for its GEMMs.

    Args:
        weight: [V, H] bfloat16.
    """

    narrow_gradient = True

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def logits(self, hidden: Tensor, start: int, stop: int, *, out: Tensor) -> None:
        torch.mm(hidden, self.weight[start:stop].T, out_dtype=torch.float32, out=out)

    def hidden_gradient(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        return torch.mm(gradient, self.weight[start:stop], out_dtype=torch.float32)

    def weight_gradient(
        self, gradient: Tensor, hidden: Tensor, *, out: Tensor, add: Tensor | None
    ) -> None:
        if add is None:
            torch.mm(gradient.T, hidden, out_dtype=out.dtype, out=out)
        elif out.dtype == torch.float32:
            torch.addmm(add, gradient.T, hidden, out_dtype=torch.float32, out=out)
        else:
            out.copy_(torch.addmm(add, gradient.T, hidden, out_dtype=torch.float32))


class NoHead:
    """The "hidden states" are logits already, and so is their gradient."""

    narrow_gradient = False

    def logits(self, hidden: Tensor, start: int, stop: int, *, out: Tensor) -> None:
        out.copy_(hidden[:, start:stop])

    def hidden_gradient(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        return gradient

    def weight_gradient(
        self, gradient: Tensor, hidden: Tensor, *, out: Tensor, add: Tensor | None
    ) -> None:
        raise AssertionError("logits have no weight")


def head_for(weight: Tensor | None) -> Head:
    """The products with this lm_head."""
    if weight is None:
        return NoHead()
    if weight.dtype == torch.float32:
        return Float32Head(weight)
    if weight.is_cuda:
        # float16 could not hold small gradients of the logits.
        return TensorCoreHead(weight) if weight.dtype == torch.bfloat16 else WideningHead(weight)
    if torch.ops.selfdistill.gemm_bf16_available():
        return BrgemmHead(weight)
    return WideningHead(weight)
