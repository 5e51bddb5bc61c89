"""The library GEMMs of the native backend: float32 logits and gradients from either input dtype."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from selfdistill_kernels.backends.native import memory
from selfdistill_kernels.backends.native.product_form import logits_product


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
    """torch.mm, and for logits the faster form of it on this machine.

    Args:
        weight: [V, H] float32.
    """

    narrow_gradient = False

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def logits(self, hidden: Tensor, start: int, stop: int, *, out: Tensor) -> None:
        logits_product(hidden, self.weight[start:stop], out=out)

    def hidden_gradient(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        return gradient @ self.weight[start:stop]

    def weight_gradient(
        self, gradient: Tensor, hidden: Tensor, *, out: Tensor, add: Tensor | None
    ) -> None:
        _add_product(gradient, hidden, out=out, add=add)


class BrgemmHead:
    """bfloat16 products with float32 results (csrc/cpu/gemm.cpp), where the processor has them.

    The gradient of the logits is rounded to bfloat16 for its GEMMs, after it was made in float32;
    the results are rounded to the inputs' dtype anyway (docs/decisions).

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

    They are widened into one buffer, a few columns at a time: fresh memory for each of them would
    cost as much as a product (docs/decisions).

    Args:
        weight: [V, H], 16-bit.
        columns: how many are widened at a time (TilePlan.widened).
    """

    narrow_gradient = False

    def __init__(self, weight: Tensor, columns: int) -> None:
        self.weight = weight
        self.columns = columns

    @functools.cached_property
    def buffer(self) -> Tensor:
        """float32 [columns, H], one memory for all parts of all products."""
        return memory.empty((self.columns, self.weight.shape[1]), self.weight.device)

    def logits(self, hidden: Tensor, start: int, stop: int, *, out: Tensor) -> None:
        wide = hidden.to(torch.float32)
        for part in self._parts(start, stop):
            into = slice(part.start - start, part.stop - start)
            torch.mm(wide, self._widened(part).T, out=out[:, into])

    def hidden_gradient(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        total = gradient.new_zeros((gradient.shape[0], self.weight.shape[1]))
        for part in self._parts(start, stop):
            of = slice(part.start - start, part.stop - start)
            total.addmm_(gradient[:, of], self._widened(part))
        return total

    def weight_gradient(
        self, gradient: Tensor, hidden: Tensor, *, out: Tensor, add: Tensor | None
    ) -> None:
        wide = hidden.to(torch.float32)
        if out.dtype == torch.float32:
            _add_product(gradient, wide, out=out, add=add)
            return
        for part in self._parts(0, gradient.shape[1]):
            made = self.buffer[: part.stop - part.start]
            before = None if add is None else add[part]
            _add_product(gradient[:, part], wide, out=made, add=before)
            out[part] = made

    def _parts(self, start: int, stop: int) -> Iterator[slice]:
        for low in range(start, stop, self.columns):
            yield slice(low, min(low + self.columns, stop))

    def _widened(self, part: slice) -> Tensor:
        """Return columns of the head in float32; the next call overwrites them."""
        return self.buffer[: part.stop - part.start].copy_(self.weight[part])


class NativeWideningHead(WideningHead):
    """The same on the CPU, where each thread widens its own parts (csrc/cpu/widened.cpp).

    Args:
        weight: [V, H] bfloat16.
        columns: how many are widened at a time, by all threads together.
    """

    def logits(self, hidden: Tensor, start: int, stop: int, *, out: Tensor) -> None:
        torch.ops.selfdistill.gemm_widened_logits_(
            hidden.to(torch.float32), self.weight[start:stop], out, self.buffer
        )

    def hidden_gradient(self, gradient: Tensor, start: int, stop: int) -> Tensor:
        made = gradient.new_empty((gradient.shape[0], self.weight.shape[1]))
        torch.ops.selfdistill.gemm_widened_hidden_gradient_(
            gradient, self.weight[start:stop], made, self.buffer
        )
        return made

    def weight_gradient(
        self, gradient: Tensor, hidden: Tensor, *, out: Tensor, add: Tensor | None
    ) -> None:
        if out.dtype == torch.float32:
            super().weight_gradient(gradient, hidden, out=out, add=add)
            return
        torch.ops.selfdistill.gemm_widened_weight_gradient_(
            gradient, hidden.to(torch.float32), add, out, self.buffer
        )


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


def is_widened(weight: Tensor | None) -> bool:
    """Whether the products of this lm_head widen its columns to float32 on the way."""
    return weight is not None and widens(weight.dtype, weight.device.type)


def widens(dtype: torch.dtype, device: str) -> bool:
    """Whether products of this dtype on a device ("cpu", "cuda") are float32 products of widened
    columns."""
    if dtype == torch.float32:
        return False
    if dtype == torch.float16:  # it could not hold small gradients of the logits
        return True
    return device != "cuda" and not torch.ops.selfdistill.gemm_bf16_available()


def head_for(weight: Tensor | None, widened: int) -> Head:
    """The products with this lm_head; `widened` columns of it at a time, where they need that."""
    if weight is None:
        return NoHead()
    if weight.dtype == torch.float32:
        return Float32Head(weight)
    if is_widened(weight):
        kind = WideningHead if weight.is_cuda else NativeWideningHead
        return kind(weight, widened)
    return TensorCoreHead(weight) if weight.is_cuda else BrgemmHead(weight)


def _add_product(gradient: Tensor, hidden: Tensor, *, out: Tensor, add: Tensor | None) -> None:
    """out [c, H] = gradient [r, c]^T hidden [r, H] (+ add [c, H]), all float32."""
    if add is None:
        torch.mm(gradient.T, hidden, out=out)
    else:
        torch.addmm(add, gradient.T, hidden, out=out)
