"""An adapted layer as one function: peft's numbers and gradients, and what is left to peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor
from transformers import PreTrainedModel

from selfdistill.config import AdapterConfig
from selfdistill.model.adapted_linear import AdaptedLinear, _AdaptedProduct
from selfdistill.model.adapters import attach_adapter
from selfdistill.model.randomness import enable_activation_checkpointing

ModelFactory = Callable[..., PreTrainedModel]
IDS = torch.arange(40).view(2, 20) % 23


def adapted(tiny_model: ModelFactory, dtype: torch.dtype) -> PeftModel:
    student = attach_adapter(tiny_model("llama").to(dtype), AdapterConfig(r=3), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return student


def as_peft_writes_it(model: PeftModel) -> PeftModel:
    for module in model.modules():
        if type(module) is AdaptedLinear:
            module.__class__ = Linear
    return model


def passes(model: PeftModel) -> dict[str, Tensor]:
    """Logits and gradients of one pass."""
    logits = model(IDS).logits
    logits.float().log_softmax(-1)[..., 5].sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": logits.detach(), **gradients}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, relative to its largest entry."""
    assert found.keys() == expected.keys()
    return max(
        float((found[n].double() - e.double()).abs().max() / e.double().abs().max().clamp(min=1e-9))
        for n, e in expected.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_gradients_are_as_close_as_pefts(
    tiny_model: ModelFactory, dtype: torch.dtype
) -> None:
    exact = passes(as_peft_writes_it(adapted(tiny_model, dtype).double()))
    theirs = distance(passes(as_peft_writes_it(adapted(tiny_model, dtype))), exact)
    ours = distance(passes(adapted(tiny_model, dtype)), exact)
    assert len(exact) == 1 + 3 * 7 * 2
    assert ours <= 3 * theirs + 1e-7
    if dtype == torch.float32:
        assert ours < 1e-4


def test_layers_compute_as_one_function(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    apply = _AdaptedProduct.apply

    def counted(*operands: Any) -> Tensor:
        calls.append(operands)
        return cast(Tensor, apply(*operands))

    monkeypatch.setattr(_AdaptedProduct, "apply", counted)
    adapted(tiny_model, torch.float32)(IDS)
    assert len(calls) == 3 * 7


def test_recomputed_layers_have_the_same_gradients(tiny_model: ModelFactory) -> None:
    model = adapted(tiny_model, torch.float32)
    expected = passes(model)
    enable_activation_checkpointing(model)
    model.enable_input_require_grads()
    found = passes(model)
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("what", ["off", "merged", "autocast", "trained", "training"])
def test_what_is_no_plain_adapter_is_left_to_peft(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("computed as one function")

    model, theirs = (adapted(tiny_model, torch.float32) for _ in range(2))
    as_peft_writes_it(theirs)
    monkeypatch.setattr(_AdaptedProduct, "apply", refuse)
    for one in (model, theirs):
        layers = [m for m in one.modules() if isinstance(m, Linear)]
        if what == "off":
            one.disable_adapter_layers()
        elif what == "merged":
            one.merge_adapter()
        elif what == "trained":
            for layer in layers:
                layer.base_layer.requires_grad_(True)
        elif what == "training":
            for layer in layers:
                layer.lora_dropout["default"] = torch.nn.Dropout(0.0)
            one.train()
    with torch.autocast("cpu", enabled=what == "autocast"):
        assert torch.equal(model(IDS).logits, theirs(IDS).logits)
