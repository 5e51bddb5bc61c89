"""The two forms of the float32 logits product: right in any shape, and chosen by time alone."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_no_worse_than_torch

from selfdistill_kernels import fused_linear_distillation
from selfdistill_kernels.backends.native import product_form
from selfdistill_kernels.backends.native.product_form import Comparison, compare, form_for

ops = torch.ops.selfdistill
# Tokens, hidden size, vocabulary: single rows and columns, several blocks of 256 with a rest.
SHAPES = [(1, 1, 1), (1, 33, 70), (17, 40, 101), (300, 24, 561), (257, 5, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed_logits(shape, threads):
    """Of parts of wider matrices; what lies beside the result stays."""
    tokens, size, vocabulary = shape
    hidden = torch.randn(tokens, size + 3)[:, :size]
    weight = torch.randn(vocabulary, size + 2)[:, :size]
    out = torch.full((tokens, vocabulary + 5), torch.nan)
    ops.gemm_transposed_logits_(hidden, weight, out[:, :vocabulary])
    assert out[:, vocabulary:].isnan().all()
    exact = hidden.double() @ weight.double().T
    assert_no_worse_than_torch("logits", out[:, :vocabulary], hidden @ weight.T, exact)


@pytest.mark.parametrize("size", [24, 64])
def test_what_is_left_behind_blocks_has_the_same_bits(size: int) -> None:
    """Where a comparison says so. Blocks of few tokens or columns would sum in other orders."""
    hidden, weight = torch.randn(271, size), torch.randn(8192 + 15, size)
    if not compare(hidden[:256], weight, torch.empty(256, 8207)).same_bits:
        pytest.skip("this library makes other bits in the other form, which is never taken then")
    for tokens in (256, 257, 263, 271):
        for columns in (8192, 8193, 8195, 8207):
            out = torch.empty(tokens, columns)
            ops.gemm_transposed_logits_(hidden[:tokens], weight[:columns], out)
            assert torch.equal(out, hidden[:tokens] @ weight[:columns].T), (tokens, columns)


def test_any_number_of_threads_makes_the_same_bits():
    hidden, weight = torch.randn(70, 48), torch.randn(1030, 48)
    before, made = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            made.append(torch.empty(70, 1030))
            ops.gemm_transposed_logits_(hidden, weight, made[-1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(made[0], other) for other in made[1:])


@pytest.mark.parametrize("name", ["hidden", "weight", "out"])
def test_operands_of_another_kind_are_refused(name):
    operands = {
        "hidden": torch.randn(3, 4),
        "weight": torch.randn(5, 4),
        "out": torch.empty(3, 5),
    }
    operands[name] = operands[name].double()
    with pytest.raises(RuntimeError, match=rf"{name}: expected a Float CPU tensor \[\d, \d\]"):
        ops.gemm_transposed_logits_(*operands.values())


def test_a_form_is_taken_for_its_time_where_bits_are_the_same():
    assert Comparison(ratio=0.6, same_bits=True).form == "transposed"
    assert Comparison(ratio=0.95, same_bits=True).form == "plain"
    assert Comparison(ratio=0.6, same_bits=False).form == "plain"
    assert Comparison(0.6, True).describe() == (
        "transposed (transposed in 0.60 of the plain time, the same bits)"
    )


def test_a_class_of_shapes_is_compared_once(monkeypatch):
    asked = []

    def fake(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Comparison:
        asked.append((*hidden.shape, weight.shape[0], *out.shape))
        return Comparison(0.5, True)

    monkeypatch.setattr(product_form, "compare", fake)
    monkeypatch.setattr(product_form, "_compared", {})

    def form(tokens: int, columns: int, device: str = "cpu") -> str:
        hidden, weight = (torch.empty(n, 4, device=device) for n in (tokens, columns))
        return form_for(hidden, weight, torch.empty(tokens, columns, device=device))

    for tokens in (16, 31, 32, 255, 256, 300):
        assert form(tokens, 8192) == "transposed"
    assert asked == [(n, 4, 8192, n, 8192) for n in (16, 32, 128, 256)]
    assert {form(15, 8192), form(16, 8191), form(16, 8192, "meta")} == {"plain"}


def test_a_comparison_tells_other_bits():
    hidden, weight = torch.randn(32, 24), torch.randn(9000, 24)
    out = torch.empty(32, 9000)
    found = compare(hidden, weight, out)
    assert found.ratio > 0
    halves = out[:, :4500], out[:, 4500:]
    assert found.same_bits == torch.equal(*halves)
    exact = hidden.double() @ weight[:4500].double().T
    for half in halves:
        assert_no_worse_than_torch("logits", half, hidden @ weight[:4500].T, exact)
    # A NaN in a padded row is no other bit.
    hidden[3] = torch.nan
    assert compare(hidden, weight, out).same_bits == found.same_bits


def test_other_bits_are_seen(monkeypatch):
    def off_by_one_bit(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(hidden @ weight.T)
        out[0, 0] = out[0, 0].nextafter(torch.tensor(torch.inf))

    monkeypatch.setattr(ops, "gemm_transposed_logits_", off_by_one_bit)
    found = compare(torch.randn(16, 8), torch.randn(200, 8), torch.empty(16, 200))
    assert not found.same_bits
    assert found.form == "plain"


@pytest.mark.parametrize("workspace", ["auto", 100_000], ids=["store", "recompute"])
def test_a_loss_takes_the_form(monkeypatch, workspace):
    """Gradients from either form are those of the other, to the rounding of one product."""
    torch.manual_seed(0)
    student, teacher, weight = torch.randn(40, 24), torch.randn(40, 24), torch.randn(700, 24)
    calls = []
    transposed = ops.gemm_transposed_logits_

    def recorded(*operands: torch.Tensor) -> None:
        calls.append(operands[0].shape[0])
        transposed(*operands)

    def gradients(form: str, dtype: torch.dtype) -> list[torch.Tensor]:
        monkeypatch.setattr(product_form, "form_for", lambda hidden, weight, out: form)
        h, w = student.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        loss = fused_linear_distillation(h, teacher.to(dtype), w, workspace=workspace).loss
        loss.backward()
        return [loss.detach(), h.grad, w.grad]

    exact = gradients("plain", torch.float64)
    plain = gradients("plain", torch.float32)
    monkeypatch.setattr(ops, "gemm_transposed_logits_", recorded)
    turned = gradients("transposed", torch.float32)
    assert calls
    for name, ours, torchs, right in zip(("loss", "dH", "dW"), turned, plain, exact, strict=True):
        assert_no_worse_than_torch(name, ours, torchs, right)
