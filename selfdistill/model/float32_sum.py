"""Gradients of rows that are read many times, added up in float32.

Autograd adds the gradients of an embedding's row, and of gathered rows, in the dtype of the tensor:
in bfloat16 a thousand ones are 256 on a CPU, and a token that occurs 2048 times in a pass is off by
a fifth and more. Here they are added in float32 and rounded once. In float32 and float64 nothing
changes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def select_rows(source: Tensor, dim: int, index: Tensor) -> Tensor:
    """`source.index_select(dim, index)` whose gradient is added up in float32.

    Args:
        source: any shape and floating dtype.
        dim: not negative.
        index: [N] int64, each place as often as wanted.
    """
    if not _is_half(source):
        return source.index_select(dim, index)
    return cast(Tensor, _SelectRows.apply(source, dim, index))


def sum_embedding_gradients_in_float32(model: nn.Module) -> None:
    """Let every embedding of a model add up its gradient in float32; call it before training.

    Their classes change to subclasses, so an embedding that scales what it looks up still does.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and not isinstance(module, _Embedding):
            own = type(module)
            bases = (_Embedding,) if own is nn.Embedding else (own, _Embedding)
            module.__class__ = type(own.__name__, bases, {"__module__": own.__module__})


class _Embedding(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        special = self.max_norm is not None or self.scale_grad_by_freq or self.sparse
        if special or not (_is_half(self.weight) and self.weight.requires_grad):
            return super().forward(input)
        return cast(Tensor, _LookUp.apply(self.weight, input, self.padding_idx))


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding_idx = weight.shape, padding_idx
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (ids,) = ctx.saved_tensors
        # Only the rows that occur exist in float32.
        rows, places = ids.unique(return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(
            gradient.float(), places, len(rows), -1, False
        )
        total = gradient.new_zeros(ctx.shape)
        total[rows] = sums.to(total.dtype)
        if ctx.padding_idx is not None:
            total[ctx.padding_idx] = 0
        return total, None, None


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, dim: int, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dim = source.shape, dim
        return source.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=gradient.device)
        total.index_add_(ctx.dim, index, gradient.float())
        return total.to(gradient.dtype), None, None


def _is_half(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize < 4
