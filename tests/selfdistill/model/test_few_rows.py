"""Linear layers that read few rows: which calls take the kernel, and that samples stay the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from selfdistill.config import AdapterConfig
from selfdistill.model import adapted_linear, few_rows
from selfdistill.model.adapters import attach_adapter
from selfdistill.model.few_rows import FewRowsLinear, sample_fast
from selfdistill.rollout.engine import Rollout, SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill_kernels.backends.native.few_rows import MOST_ROWS, is_built

ModelFactory = Callable[..., PreTrainedModel]

pytestmark = pytest.mark.skipif(
    not is_built(), reason="the kernels are not built: pip install --no-build-isolation ."
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of the kernel."""
    rows: list[int] = []
    kernel = few_rows.few_rows_linear

    def counted(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        rows.append(len(x))
        return kernel(x, *args, **kwargs)

    monkeypatch.setattr(few_rows, "few_rows_linear", counted)
    monkeypatch.setattr(adapted_linear, "few_rows_linear", counted)
    return rows


def test_only_few_rows_without_gradient_take_the_kernel(calls: list[int]) -> None:
    layer = nn.Sequential(nn.Linear(24, 5))
    sample_fast(layer)
    assert isinstance(layer[0], FewRowsLinear)
    x = torch.randn(3, 4, 24)
    expected = nn.functional.linear(x, layer[0].weight, layer[0].bias)
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer(x.mT.contiguous().mT), expected, rtol=1e-5, atol=1e-6)
        assert calls == [12, 12]
        layer(torch.randn(MOST_ROWS + 1, 24))
        layer(x[:0])
        with torch.autocast("cpu"):
            layer(x)
        layer.double()(x.double())
    assert calls == [12, 12]


@pytest.mark.parametrize("adapter", [False, True])
def test_the_same_seed_samples_the_same_tokens(
    tiny_model: ModelFactory, calls: list[int], adapter: bool
) -> None:
    def student() -> nn.Module:
        model = tiny_model("llama").eval()
        if not adapter:
            return model
        wrapped = attach_adapter(model, AdapterConfig(r=3), seed=1)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
        return wrapped

    def sample(model: nn.Module) -> list[Rollout]:
        engine = TransformersEngine(model, build_tokenizer(), batch_size=6)
        engine.eos_token_ids = []
        params = SamplingParams(temperature=1.0, max_new_tokens=12, seed=3)
        groups = engine.generate([[3, 4, 5], [6, 7]], group_size=3, params=params)
        return [rollout for group in groups for rollout in group]

    plain = student()
    for module in plain.modules():
        if type(module) is adapted_linear.AdaptedLinear:
            module.__class__ = adapted_linear.Linear
    expected = sample(plain)
    assert not calls
    fast = student()
    sample_fast(fast)
    found = sample(fast)
    assert calls
    for rollout, other in zip(found, expected, strict=True):
        assert rollout.token_ids == other.token_ids
        assert rollout.logprobs == pytest.approx(other.logprobs, abs=1e-4)
