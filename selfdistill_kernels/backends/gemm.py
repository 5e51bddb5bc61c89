"""The library GEMMs of the native backend: float32 logits and gradients from either input dtype."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from selfdistill_kernels.backends.base import LinearInputs

# Columns of the head that are widened at a time: large enough for the GEMM, small beside a tile.
SLAB = 4096


class Gemm(Protocol):
    """The three products of one tile."""

    narrow_gradient: bool

    def logits(self, hidden: Tensor, weight: Tensor | None, *, out: Tensor) -> None:
        """out [r, V] float32 = hidden [r, H] weight[V, H]^T."""
        ...

    def gradient_view(self, rows: Tensor) -> Tensor:
        """The gradient [p, V] that the row kernels left in workspace rows."""
        ...

    def hidden_gradient(self, gradient: Tensor, weight: Tensor | None) -> Tensor:
        """dH [p, H] = gradient [p, V] weight [V, H]."""
        ...

    def add_weight_gradient(
        self, gradient: Tensor, hidden: Tensor, total: Tensor, *, first: bool
    ) -> None:
        """total [V, H] float32 += gradient [p, V]^T hidden [p, H] (`first`: =)."""
        ...


class Float32Gemm:
    """torch.mm."""

    narrow_gradient = False

    def logits(self, hidden: Tensor, weight: Tensor | None, *, out: Tensor) -> None:
        assert weight is not None
        torch.mm(hidden, weight.T, out=out)

    def gradient_view(self, rows: Tensor) -> Tensor:
        return rows

    def hidden_gradient(self, gradient: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return gradient @ weight

    def add_weight_gradient(
        self, gradient: Tensor, hidden: Tensor, total: Tensor, *, first: bool
    ) -> None:
        if first:
            torch.mm(gradient.T, hidden, out=total)
        else:
            total.addmm_(gradient.T, hidden)


class WideningGemm(Float32Gemm):
    """float32 products of bfloat16 inputs: slabs of the head are widened on the way."""

    def logits(self, hidden: Tensor, weight: Tensor | None, *, out: Tensor) -> None:
        assert weight is not None
        wide = hidden.to(torch.float32)
        for start in range(0, weight.shape[0], SLAB):
            slab = weight[start : start + SLAB].to(torch.float32)
            out[:, start : start + SLAB] = wide @ slab.T

    def hidden_gradient(self, gradient: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        total = gradient.new_zeros((gradient.shape[0], weight.shape[1]))
        for start in range(0, weight.shape[0], SLAB):
            slab = weight[start : start + SLAB].to(torch.float32)
            total.addmm_(gradient[:, start : start + SLAB], slab)
        return total

    def add_weight_gradient(
        self, gradient: Tensor, hidden: Tensor, total: Tensor, *, first: bool
    ) -> None:
        super().add_weight_gradient(gradient, hidden.to(torch.float32), total, first=first)


class IdentityGemm(Float32Gemm):
    """No head: the "hidden states" are logits already and so is their gradient."""

    def logits(self, hidden: Tensor, weight: Tensor | None, *, out: Tensor) -> None:
        out.copy_(hidden)

    def hidden_gradient(self, gradient: Tensor, weight: Tensor | None) -> Tensor:
        return gradient


def gemm_for(inputs: LinearInputs) -> Gemm:
    """The products for these inputs."""
    if inputs.weight is None:
        return IdentityGemm()
    return Float32Gemm() if inputs.weight.dtype == torch.float32 else WideningGemm()
