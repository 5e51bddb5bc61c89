"""The product with few rows: float32's accuracy, any shape, and the same bits beside other rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from selfdistill_kernels.backends.native.few_rows import (
    few_rows_linear,
    is_built,
    reads_few_rows,
)

pytestmark = pytest.mark.skipif(
    not is_built(), reason="the kernels are not built: pip install --no-build-isolation ."
)


@pytest.fixture(params=["default", "avx2", "avx512"])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has."""
    ops = torch.ops.selfdistill
    before = ops.cpu_capability()
    try:
        ops.set_cpu_capability(request.param)
    except RuntimeError:
        pytest.skip(f"this processor has no {request.param}: run on one that does")
    yield request.param
    ops.set_cpu_capability(before)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("rows", [1, 7, 16, 17, 33, 64, 65, 130])
@pytest.mark.parametrize(("depth", "columns", "rank"), [(576, 192, 16), (37, 101, 3), (1, 1, 0)])
def test_as_exact_as_the_library(rows: int, depth: int, columns: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rows)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x, weight, bias = draw(rows, depth), draw(columns, depth + 3)[:, :depth], draw(columns)
    down, up = draw(rank, depth), draw(columns, rank)

    def product(*tensors: torch.Tensor) -> torch.Tensor:
        x, weight, bias, down, up = tensors
        return x @ weight.T + bias + 0.5 * (x @ down.T) @ up.T

    plain = product(x, weight, bias, down, up)
    exact = product(*(t.double() for t in (x, weight, bias, down, up)))
    adapter = {"down": down, "up": up, "scaling": 0.5} if rank else {}
    found = few_rows_linear(x, weight, bias, **adapter)
    assert found.shape == plain.shape
    error, reached = ((t - exact).abs().max() for t in (found, plain))
    # One running sum of `depth` products, where a library may have several shorter ones.
    assert error <= 4 * reached + 1e-6 * exact.abs().max()


@pytest.mark.usefixtures("capability")
def test_a_row_has_the_same_bits_beside_any_others() -> None:
    x, weight = torch.randn(50, 130), torch.randn(200, 130)
    whole = few_rows_linear(x, weight)
    for start, stop in ((0, 1), (3, 20), (17, 50)):
        assert torch.equal(few_rows_linear(x[start:stop], weight), whole[start:stop])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(few_rows_linear(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


def test_wrong_operands_are_named() -> None:
    x, weight = torch.randn(2, 5), torch.randn(4, 5)
    with pytest.raises(RuntimeError, match="weight: expected a Float CPU tensor"):
        few_rows_linear(x, weight.double())
    with pytest.raises(RuntimeError, match="weight: expected"):
        few_rows_linear(x, weight[:, :4])
    with pytest.raises(RuntimeError, match="bias: expected"):
        few_rows_linear(x, weight, torch.randn(5))
    with pytest.raises(RuntimeError, match="down and up"):
        few_rows_linear(x, weight, down=x)
    with torch.no_grad():
        assert reads_few_rows(x, weight)
        assert not reads_few_rows(x.bfloat16(), weight.bfloat16())
    assert not reads_few_rows(x, weight)
