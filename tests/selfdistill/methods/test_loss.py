from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax
from transformers import CohereConfig, CohereForCausalLM, LlamaForCausalLM, PreTrainedModel

from selfdistill.config import LossConfig
from selfdistill.layout import PromptGroup
from selfdistill.methods.loss import DistillationLoss, Head, UnsupportedHeadError, lm_head
from selfdistill.scoring import ScoredTokens, score
from selfdistill.teacher import BaseTeacher, LiveTeacher

ModelFactory = Callable[..., PreTrainedModel]


def own_logits(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Logits of the completion tokens by the model's own forward, without packing."""
    ids = torch.tensor([prompt + completion[:-1]])
    return model(input_ids=ids).logits[0, len(prompt) - 1 :]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_loss_and_gradient_equal_the_models_own_logits(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], family: str
) -> None:
    overrides = {"final_logit_softcapping": 3.0} if family == "gemma3" else {}
    student = tiny_model(family, seed=0, **overrides)
    base = tiny_model(family, seed=1, **overrides)
    expected = torch.zeros(())
    for group in ragged_groups:
        for prompt, completion in zip(group.teacher_prompts, group.completions, strict=True):
            with torch.no_grad():
                target = log_softmax(own_logits(base, prompt, completion) / 1.5, -1)
            logits = own_logits(student, group.student_prompt, completion)
            expected = expected + kl_div(
                log_softmax(logits / 1.5, -1), target, log_target=True, reduction="sum"
            )
    expected = expected / 100
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()

    loss = DistillationLoss(LossConfig(temperature=1.5))
    scored = score(student, BaseTeacher(base), ragged_groups)
    output = loss(scored, lm_head(student), lm_head(base), normalizer=100)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        error = (parameter.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 2e-5, name
    assert all(parameter.grad is None for parameter in base.parameters())


def random_tokens(hidden: int) -> ScoredTokens:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(20, hidden, generator=generator) for _ in range(2)]
    targets = torch.randint(0, 61, (20,), generator=generator)
    empty: Any = None
    return ScoredTokens(draw[0].requires_grad_(), draw[1], targets, *[empty] * 4)


def test_a_live_teacher_shares_the_head_and_a_base_teacher_has_its_own() -> None:
    scored = random_tokens(8)
    weight = torch.nn.Parameter(torch.randn(61, 8, generator=torch.Generator().manual_seed(1)))
    own = Head(weight, None, None, 1.0)
    other = Head(weight.detach() * 2, None, None, 1.0)
    loss = DistillationLoss(LossConfig())
    shared = loss(scored, own, own, normalizer=1.0)
    separate = loss(scored, own, other, normalizer=1.0)
    expected = log_softmax(scored.teacher_hidden @ weight.T, -1).detach()
    expected = expected.gather(-1, scored.targets[:, None])[:, 0]
    torch.testing.assert_close(shared.teacher_logprob, expected)
    assert not torch.allclose(separate.teacher_logprob, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": {"name": "reverse_kl"}},
        {"objective": {"name": "jsd", "beta": 0.3}},
        {"objective": {"name": "jsd", "beta": 0.6}},
        {"advantage_mask": {"threshold": 0.3}},
        {"advantage_mask": {"threshold": 0.3, "sign": "negative"}},
        {"temperature": 2.0},
    ],
)
def test_every_setting_changes_the_gradient(settings: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.randn(61, 8, generator=torch.Generator().manual_seed(1)))
    head = Head(weight, None, None, 1.0)
    gradients = []
    for chosen in ({}, settings):
        scored = random_tokens(8)
        loss = DistillationLoss(LossConfig.model_validate(chosen))
        loss(scored, head, head, normalizer=20).loss.backward()
        gradients.append(scored.student_hidden.grad)
    assert not torch.allclose(*gradients, rtol=1e-3)


def test_the_advantage_mask_drops_tokens_and_says_which() -> None:
    head = Head(torch.randn(61, 8, generator=torch.Generator().manual_seed(1)), None, None, 1.0)
    scored = random_tokens(8)
    settings = LossConfig.model_validate({"advantage_mask": {"threshold": 0.5}})
    output = DistillationLoss(settings)(scored, head, head, normalizer=20)
    output.loss.backward()
    assert output.advantage is not None
    assert torch.equal(output.active, output.advantage.abs() > 0.5)
    assert 0 < output.active.sum() < 20
    assert scored.student_hidden.grad is not None
    assert torch.equal(scored.student_hidden.grad.abs().sum(-1) > 0, output.active)


def test_logit_scale_is_found() -> None:
    config = CohereConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    assert lm_head(CohereForCausalLM(config)).logit_scale == 0.25


def test_a_head_that_does_more_is_refused(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, logits: logits**3)
    with pytest.raises(UnsupportedHeadError, match=r"LlamaForCausalLM.*soft cap alone"):
        lm_head(model)


def test_live_teacher_with_equal_prompts_has_nothing_to_teach(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student = tiny_model("llama")
    groups = [
        PromptGroup(g.student_prompt, [g.student_prompt] * len(g.completions), g.completions)
        for g in ragged_groups
    ]
    scored = score(student, LiveTeacher(), groups)
    head = lm_head(student)
    output = DistillationLoss(LossConfig())(scored, head, head, normalizer=1.0)
    assert output.loss.item() < 1e-6
