from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from selfdistill.config import AdapterConfig
from selfdistill.model.adapters import UnsupportedAdapterError, attach_adapter

ModelFactory = Callable[..., PreTrainedModel]
IDS = torch.tensor([[5, 6, 7]])


def test_an_adapter_starts_as_the_base_model_and_only_it_learns(tiny_model: ModelFactory) -> None:
    base = tiny_model("llama").eval()
    expected = base(IDS).logits
    student = attach_adapter(base, AdapterConfig(r=3), seed=1)
    # B is zero: the same products, and sums with zeros.
    torch.testing.assert_close(student(IDS).logits, expected, rtol=1e-6, atol=1e-6)
    learning = [name for name, p in student.named_parameters() if p.requires_grad]
    assert len(learning) == 3 * 7 * 2  # layers, linear layers of each, A and B
    assert all("lora_" in name for name in learning)


def test_adapters_are_drawn_from_the_seed_alone(tiny_model: ModelFactory) -> None:
    def draw(seed: int) -> torch.Tensor:
        student = attach_adapter(tiny_model("llama"), AdapterConfig(), seed=seed)
        return torch.cat([p.flatten() for n, p in student.named_parameters() if "lora_A" in n])

    torch.manual_seed(7)
    before = torch.get_rng_state()
    model = tiny_model("llama")
    after = torch.get_rng_state()
    attach_adapter(model, AdapterConfig(), seed=1)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(before, after)
    one = draw(1)
    assert torch.equal(one, draw(1))
    assert not torch.equal(one, draw(2))


def test_chosen_layers_only(tiny_model: ModelFactory) -> None:
    student = attach_adapter(tiny_model("llama"), AdapterConfig(target_modules=("q_proj",)), seed=1)
    learning = [name for name, p in student.named_parameters() if p.requires_grad]
    assert len(learning) == 3 * 2
    assert all("q_proj" in name for name in learning)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("q_proj", "lm_head"), "names the lm_head, which stays frozen"),
        (("q_proj", "embed_tokens"), "names the embedding, which stays frozen"),
        (("query",), "query"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(
    tiny_model: ModelFactory, layers: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"adapter.target_modules.*{message}"):
        attach_adapter(tiny_model("llama"), AdapterConfig(target_modules=layers), seed=1)
