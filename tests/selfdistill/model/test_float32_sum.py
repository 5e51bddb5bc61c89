"""Many gradients of one row lose nothing in bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from selfdistill.config import LossConfig
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.model.float32_sum import select_rows, sum_embedding_gradients_in_float32
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.teacher import BaseTeacher
from selfdistill.model.weights import TrainedWeights
from selfdistill.training.gradients import StudentLoss, accumulate_gradients

ModelFactory = Callable[..., PreTrainedModel]

TOKEN = 9
OCCURRENCES = 2048
# A sum rounded once to bfloat16 is off by at most 2^-9, relative to each number.
ROUNDED_ONCE = 2.0**-9


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("count", [1, 8, OCCURRENCES])
def test_rows_that_are_selected_often(count: int) -> None:
    torch.manual_seed(0)
    gradient = (torch.randn(4, 3 * count, 16) + 1).bfloat16()
    index = torch.tensor([5, 0, 2]).repeat(count)
    source = torch.randn(4, 7, 16).bfloat16().requires_grad_()
    selected = select_rows(source, 1, index)
    assert torch.equal(selected, source[:, index])
    selected.backward(gradient)
    expected = torch.zeros(4, 7, 16, dtype=torch.float64)
    expected[:, [5, 0, 2]] = gradient.double().view(4, count, 3, 16).sum(1)
    assert source.grad is not None
    assert source.grad.dtype == torch.bfloat16
    assert error(source.grad, expected) < ROUNDED_ONCE


def test_float32_is_left_alone() -> None:
    source = torch.randn(4, 5, requires_grad=True)
    assert "IndexSelect" in type(select_rows(source, 0, torch.tensor([1, 1])).grad_fn).__name__
    model = nn.Sequential(nn.Embedding(4, 5))
    sum_embedding_gradients_in_float32(model)
    assert "EmbeddingBackward" in type(model(torch.tensor([1, 1])).grad_fn).__name__


def test_an_embedding_is_what_it_was() -> None:
    """Padding has no gradient, a scaled one scales; twice changes nothing more."""

    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 3.0

    for kind, scale in ((nn.Embedding, 1.0), (Scaled, 3.0)):
        embedding = kind(11, 8, padding_idx=2).bfloat16()
        model = nn.ModuleList([embedding])
        ids = torch.tensor([[1, 2, 3], [3, 3, 2]])
        expected = embedding(ids)
        sum_embedding_gradients_in_float32(model)
        sum_embedding_gradients_in_float32(model)
        assert type(embedding).__name__ == kind.__name__
        assert isinstance(embedding, kind)
        got = embedding(ids)
        assert torch.equal(got, expected)
        got.backward(torch.ones_like(got))
        assert embedding.weight.grad is not None
        assert embedding.weight.grad[:, 0].tolist() == [
            {1: scale, 3: 3 * scale}.get(token, 0.0) for token in range(11)
        ]


class Recorder:
    """Adds up, in float64, the gradient of every lookup of one token."""

    def __init__(self, embedding: nn.Module) -> None:
        self.total = torch.tensor(0.0, dtype=torch.float64)
        embedding.register_forward_hook(self._look)

    def _look(self, module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        places = args[0] == TOKEN
        if output.requires_grad:
            output.register_hook(lambda gradient: self._add(gradient[places]))

    def _add(self, gradients: torch.Tensor) -> None:
        assert len(gradients) > OCCURRENCES / 2
        self.total = self.total + gradients.double().sum(0)


def train_once(model: PreTrainedModel, teacher: PreTrainedModel) -> torch.Tensor:
    """[H], what the optimiser gets for the embedding of the token that occurs so often."""
    weights = TrainedWeights(model)
    strategy = BaseTeacher(teacher)
    loss = DistillationLoss(LossConfig())
    objective = StudentLoss(model, strategy, loss, lm_heads=find_lm_heads(model, strategy))
    rollouts = [[TOKEN] * (OCCURRENCES // 8) + [5]] * 8
    group = PromptGroup([3, 4], [[3, 4, 6]] * 8, rollouts)
    accumulate_gradients(objective, [group], tokens_per_pass=100_000)
    gradient = weights.masters["model.embed_tokens.weight"].grad
    assert gradient is not None
    return gradient[TOKEN]


def test_a_token_that_occurs_thousands_of_times_in_a_pass(tiny_model: ModelFactory) -> None:
    teacher = tiny_model("llama", seed=1).bfloat16()
    model = tiny_model("llama").bfloat16()
    recorder = Recorder(model.get_input_embeddings())
    got = train_once(model, teacher)
    assert error(got, recorder.total) < ROUNDED_ONCE


def test_a_tied_head_adds_its_own_part(tiny_model: ModelFactory) -> None:
    teacher = tiny_model("qwen3", seed=1).bfloat16()
    model = tiny_model("qwen3").bfloat16()
    recorder = Recorder(model.get_input_embeddings())
    both = train_once(model, teacher)
    head_alone = tiny_model("qwen3").bfloat16()
    head_alone.get_input_embeddings().register_forward_hook(lambda m, args, output: output.detach())
    head = train_once(head_alone, teacher)
    # Three numbers are rounded: both parts, and their sum.
    expected = recorder.total + head.double()
    rounded = 2 * ROUNDED_ONCE * (recorder.total.norm() + head.double().norm())
    assert (both.double() - expected).norm() < rounded
    assert recorder.total.norm() > 0.1 * head.norm()
