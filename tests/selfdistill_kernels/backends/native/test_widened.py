"""Products of bfloat16 matrices in float32 (csrc/cpu/widened.cpp): as good as torch's own float32
ones, for any number of threads, any strides and any buffer."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import assert_no_worse_than_torch
from processors import needs

from selfdistill_kernels.backends.native.gemm import NativeWideningHead

ops = torch.ops.selfdistill
# Rows, hidden size, vocabulary, columns of the buffer: single rows and columns, parts with a rest.
SHAPES = [(1, 1, 1, 1), (1, 33, 70, 16), (5, 40, 101, 48), (64, 96, 300, 256), (37, 17, 257, 7)]


@pytest.fixture(params=["avx512", "avx2", "default"])
def capability(request):
    before = ops.cpu_capability()
    try:
        ops.set_cpu_capability(request.param)
    except RuntimeError:
        pytest.skip(needs(request.param))
    yield
    ops.set_cpu_capability(before)


def bfloat16(*shape: int) -> torch.Tensor:
    """A part of a wider matrix, so that rows do not follow each other."""
    return torch.randn(shape[0], shape[1] + 3).bfloat16()[:, : shape[1]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits(shape, threads, capability):
    rows, hidden, vocabulary, columns = shape
    h, w = bfloat16(rows, hidden), bfloat16(vocabulary, hidden)
    out = torch.full((rows, vocabulary + 5), torch.nan)
    NativeWideningHead(w, columns).logits(h, 0, vocabulary, out=out[:, :vocabulary])
    assert out[:, vocabulary:].isnan().all()
    exact, plain = h.double() @ w.double().T, h.float() @ w.float().T
    assert_no_worse_than_torch("logits", out[:, :vocabulary], plain, exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hidden_gradient(shape, threads, capability):
    rows, hidden, vocabulary, columns = shape
    g, w = torch.randn(rows, vocabulary + 5)[:, :vocabulary], bfloat16(vocabulary, hidden)
    made = NativeWideningHead(w, columns).hidden_gradient(g, 0, vocabulary)
    assert_no_worse_than_torch("dH", made, g @ w.float(), g.double() @ w.double())


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_gradient(shape, dtype, add, threads, capability):
    rows, hidden, vocabulary, columns = shape
    g, h = torch.randn(rows, vocabulary + 5)[:, :vocabulary], bfloat16(rows, hidden)
    before = torch.randn(vocabulary, hidden) if add else None
    out = torch.full((vocabulary, hidden), torch.nan, dtype=dtype)
    head = NativeWideningHead(bfloat16(vocabulary, hidden), columns)
    head.weight_gradient(g, h, out=out, add=before)
    exact, plain = g.double().T @ h.double(), g.T @ h.float()
    if before is not None:
        exact, plain = exact + before.double(), plain + before
    assert_no_worse_than_torch("dW", out, plain.to(dtype), exact)


def test_no_rows_and_no_tokens():
    w = bfloat16(70, 8)
    head = NativeWideningHead(w, 16)
    head.logits(bfloat16(1, 8)[:0], 0, 70, out=torch.empty(0, 70))
    assert head.hidden_gradient(torch.empty(0, 70), 0, 70).shape == (0, 8)
    out, before = torch.empty(70, 8).bfloat16(), torch.randn(70, 8)
    head.weight_gradient(torch.empty(0, 70), bfloat16(1, 8)[:0], out=out, add=before)
    assert torch.equal(out, before.bfloat16())
    head.weight_gradient(torch.empty(0, 70), bfloat16(1, 8)[:0], out=out, add=None)
    assert not out.any()


@pytest.mark.parametrize("bits", [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x3F80, 0x7F7F])
def test_special_values_pass_through(bits, capability):
    """Zeros, infinities, NaN, the least subnormal, one and the largest number, times one."""
    word = bits - (1 << 16) if bits >= 1 << 15 else bits
    value = torch.tensor([word], dtype=torch.int16).view(torch.bfloat16)
    out = torch.empty(1, 20)
    NativeWideningHead(value.expand(20, 1).contiguous(), 16).logits(
        torch.ones(1, 1).bfloat16(), 0, 20, out=out
    )
    torch.testing.assert_close(out, value.float().expand(1, 20), rtol=0, atol=0, equal_nan=True)


def test_operands_are_checked():
    w, buffer = bfloat16(20, 8), torch.empty(16, 8)
    with pytest.raises(RuntimeError, match="hidden: expected a Float CPU tensor"):
        ops.gemm_widened_logits_(bfloat16(2, 8), w, torch.empty(2, 20), buffer)
    with pytest.raises(RuntimeError, match=r"out: expected a Float CPU tensor \[2, 20\]"):
        ops.gemm_widened_logits_(torch.empty(2, 8), w, torch.empty(2, 19), buffer)
    with pytest.raises(RuntimeError, match=r"buffer: expected a Float CPU tensor \[16, 8\]"):
        ops.gemm_widened_logits_(torch.empty(2, 8), w, torch.empty(2, 20), torch.empty(16, 7))
