"""The transposed product is the same product, and only where it was measured to be faster."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exactness import assert_no_worse_than_torch
from torch import nn
from transformers import PreTrainedModel

from selfdistill.model import few_rows
from selfdistill.model.few_rows import few_row_products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (1,), (3, 1), (2, 5)])
def test_the_product_is_as_exact_as_torchs(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(300, 400, bias=bias), torch.randn(*shape, 300)
    with torch.no_grad():
        with few_row_products(layer, enabled=True):
            ours = layer(x)
        torchs, exact = layer(x), layer.double()(x.double())
    assert ours.is_contiguous()
    assert ours.shape == torchs.shape
    assert_no_worse_than_torch("product", ours, torchs, exact)


def test_which_products_are_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, small = nn.Linear(300, 400), nn.Linear(300, 4)
    many, few = torch.randn(few_rows._FEW_ROWS + 1, 300), torch.randn(3, 300)
    model = nn.ModuleList([layer, small])
    calls: list[tuple[int, ...]] = []
    torchs = nn.functional.linear

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(weight.shape))
        return torchs(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    with few_row_products(model, enabled=True):
        with torch.no_grad():
            layer(few)
            assert calls == []
            layer(many), small(few), layer.double()(few.double())
        layer.float()(few).sum().backward()
    assert calls == [(400, 300), (4, 300), (400, 300), (400, 300)]
    assert layer.weight.grad is not None
    assert "forward" not in vars(layer)
    with torch.no_grad(), few_row_products(model, enabled=False):
        layer(few)
    assert len(calls) == 5


def test_layers_are_put_back_after_an_error(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("llama")

    def fail_inside() -> None:
        with few_row_products(model, enabled=True):
            assert any("forward" in vars(module) for module in model.modules())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail_inside()
    assert not any("forward" in vars(module) for module in model.modules())
