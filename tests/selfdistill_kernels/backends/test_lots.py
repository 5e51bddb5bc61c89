"""The numbers that rounding draws its lots from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from selfdistill_kernels.backends import lots
from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.tokens import Tokens
from selfdistill_kernels.logits import LogitTransform

KEYS = {
    torch.float32: [
        -5393419304081717678,
        7713594481250119375,
        1759006885928070573,
        1703334418938103865,
        5872687399056920995,
    ],
    torch.bfloat16: [
        2553927639540575413,
        8714062548658171855,
        -5432790195914333199,
        2760761975086253817,
        5903192756062853990,
    ],
}


def keys_of(hidden: Tensor) -> Tensor:
    tokens, size = hidden.shape
    inputs = LinearInputs(
        hidden, hidden.flip(0), torch.zeros(4, size, dtype=hidden.dtype), None, None, None,
        torch.arange(tokens) % 4, None, LogitTransform(),
    )  # fmt: skip
    return lots.keys_of(inputs, Tokens(tokens), 3)


@pytest.mark.parametrize("dtype", KEYS, ids=str)
@pytest.mark.parametrize("elements", [1, 6, 1 << 16], ids=["rows", "parts", "whole"])
def test_keys_are_those_of_every_release(
    dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a seed would draw other lots; and the parts they are made in change nothing."""
    monkeypatch.setattr(lots, "DIGEST_ELEMENTS", elements)
    hidden = ((torch.arange(15.0).view(5, 3) - 7) / 8).to(dtype)
    assert keys_of(hidden).tolist() == KEYS[dtype]
    assert keys_of(hidden[:0]).shape == (0,)


def test_keys_take_no_copy_of_the_hidden_states() -> None:
    hidden = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0))
    teacher, seen = hidden.flip(0), [0]
    inputs = LinearInputs(
        hidden, teacher, torch.zeros(4, 512), None, None, None, None, None, LogitTransform()
    )

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                storage = out.untyped_storage()
                if storage.data_ptr() not in (hidden.data_ptr(), teacher.data_ptr()):
                    seen.append(storage.nbytes())
            return out

    with Watch():
        lots.keys_of(inputs, Tokens(2048), 0)
    assert 0 < max(seen) <= 8 * lots.DIGEST_ELEMENTS < hidden.nbytes
