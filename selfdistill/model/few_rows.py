"""Products of a few rows with large weights, as sampling token after token makes them.

With several threads the float32 library of an x86 processor without AVX-512 takes 1.2 to 2.8 times
as long for x W^T with up to 64 rows as for W x^T, which is the same product, transposed
(docs/decisions).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

# From about 256 rows on both orders cost the same.
_FEW_ROWS = 128
# Smaller weights, such as those of LoRA, are multiplied faster than a result is transposed.
_LARGE_WEIGHT = 1 << 16


def transposed_is_faster() -> bool:
    """Return whether this processor's library was measured to be faster at W x^T."""
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


@contextmanager
def few_row_products(model: nn.Module, *, enabled: bool | None = None) -> Iterator[None]:
    """Let the linear layers of a model multiply a few rows as W x^T for a while.

    Results differ by rounding. Only float32 weights on a CPU and passes without gradient are
    concerned.

    Args:
        model: its `nn.Linear` modules, subclasses left out, are changed and put back.
        enabled: whether to do anything; None: `transposed_is_faster`.
    """
    changed = []
    if transposed_is_faster() if enabled is None else enabled:
        changed = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    try:
        for module in changed:
            module.__dict__["forward"] = partial(_linear, module)
        yield
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """[..., I] gives [..., O]."""
    weight, bias = module.weight, module.bias
    rows = x.shape[:-1].numel()
    if (
        rows > _FEW_ROWS
        or weight.numel() < _LARGE_WEIGHT
        or torch.is_grad_enabled()
        or weight.device.type != "cpu"
        or not weight.dtype == x.dtype == torch.float32
    ):
        return nn.functional.linear(x, weight, bias)
    product = weight @ x.reshape(rows, -1).t()
    if bias is not None:
        product += bias[:, None]
    # In rows again: fused attention and reductions read rows.
    return product.t().contiguous().view(*x.shape[:-1], -1)
