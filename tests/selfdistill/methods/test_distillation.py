from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from exactness import assert_no_worse_than_torch, relative_error
from padded_step import gradients, in_float64
from scored_tokens import plain_head, random_tokens
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from selfdistill.config import LossConfig
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import LMHead, UnsupportedHeadError, find_lm_head
from selfdistill.model.scoring import ScoredTokens, score
from selfdistill.model.teacher import BaseTeacher, LiveTeacher

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

    def plain(
        student: PreTrainedModel, base: PreTrainedModel
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total = torch.zeros(())
        for group in ragged_groups:
            for prompt, completion in zip(group.teacher_prompts, group.completions, strict=True):
                with torch.no_grad():
                    target = log_softmax(own_logits(base, prompt, completion) / 1.5, -1)
                logits = own_logits(student, group.student_prompt, completion)
                total = total + kl_div(
                    log_softmax(logits / 1.5, -1), target, log_target=True, reduction="sum"
                )
        total = total / 100
        total.backward()
        return total.detach(), gradients(student)

    torchs = plain(*map(copy.deepcopy, (student, base)))
    exact = plain(*map(in_float64, (student, base)))
    loss = DistillationLoss(LossConfig(temperature=1.5))
    scored = score(student, BaseTeacher(base), ragged_groups)
    output = loss(scored, find_lm_head(student), find_lm_head(base), normalizer=100)
    output.loss.backward()
    ours = output.loss.detach(), gradients(student)
    for name, *results in zip(("loss", "gradients"), ours, torchs, exact, strict=True):
        assert_no_worse_than_torch(name, *results)
    assert all(parameter.grad is None for parameter in base.parameters())


def test_a_sharper_teacher_divides_its_own_logits_alone(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student, base = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    expected = torch.zeros(())
    for group in ragged_groups:
        for prompt, completion in zip(group.teacher_prompts, group.completions, strict=True):
            with torch.no_grad():
                target = log_softmax(own_logits(base, prompt, completion) / (2.0 * 0.25), -1)
            logits = own_logits(student, group.student_prompt, completion)
            expected = expected + kl_div(
                log_softmax(logits / 2.0, -1), target, log_target=True, reduction="sum"
            )
    expected.backward()
    theirs = gradients(student)
    student.zero_grad()

    loss = DistillationLoss(LossConfig(temperature=2.0, teacher_temperature=0.25))
    scored = score(student, BaseTeacher(base), ragged_groups)
    output = loss(scored, find_lm_head(student), find_lm_head(base), normalizer=1)
    output.loss.backward()
    torch.testing.assert_close(output.loss.detach(), expected.detach())
    for name, gradient in gradients(student).items():
        assert relative_error(gradient, theirs[name]) < 1e-4, name


def test_a_sharper_teacher_that_caps_its_logits_is_refused(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student = tiny_model("gemma3", seed=0, final_logit_softcapping=3.0)
    head = find_lm_head(student)
    scored = score(student, LiveTeacher(), ragged_groups)
    with pytest.raises(UnsupportedHeadError, match="teacher_temperature: this model caps"):
        DistillationLoss(LossConfig(teacher_temperature=0.5))(scored, head, head, normalizer=1)


DTYPES = (torch.float32, torch.float64)


def forward_kl_of(scored: ScoredTokens, head: LMHead, dtype: torch.dtype) -> torch.Tensor:
    """Of each token, by plain torch."""
    weight = head.weight.detach().to(dtype)
    student, teacher = (
        log_softmax(hidden.to(dtype) @ weight.T, -1)
        for hidden in (scored.student_hidden, scored.teacher_hidden.detach())
    )
    return kl_div(student, teacher, log_target=True, reduction="none").sum(-1)


def test_a_live_teacher_shares_the_head_and_a_base_teacher_has_its_own() -> None:
    scored = random_tokens(8)
    weight = torch.nn.Parameter(torch.randn(61, 8, generator=torch.Generator().manual_seed(1)))
    own = plain_head(weight)
    other = plain_head(weight.detach() * 2)
    loss = DistillationLoss(LossConfig())
    shared = loss(scored, own, own, normalizer=1.0)
    separate = loss(scored, own, other, normalizer=1.0)
    torchs, exact = (
        log_softmax(scored.teacher_hidden.to(dtype) @ weight.detach().to(dtype).T, -1).gather(
            -1, scored.targets[:, None]
        )[:, 0]
        for dtype in (torch.float32, torch.float64)
    )
    assert shared.teacher_logprob is not None
    assert separate.teacher_logprob is not None
    assert_no_worse_than_torch("log-probs", shared.teacher_logprob, torchs, exact)
    assert relative_error(separate.teacher_logprob, exact) > 0.1


SKEW = {"name": "skew_kl"}
SKEW_REVERSE = {"name": "skew_reverse_kl"}


@pytest.mark.parametrize(
    ("common", "settings"),
    [
        ({}, {"objective": {"name": "reverse_kl"}}),
        ({}, {"objective": {"name": "jsd", "beta": 0.3}}),
        ({}, {"objective": {"name": "jsd", "beta": 0.6}}),
        ({}, {"objective": SKEW}),
        ({"objective": SKEW}, {"objective": {**SKEW, "beta": 0.3}}),
        ({}, {"objective": SKEW_REVERSE}),
        ({"objective": SKEW_REVERSE}, {"objective": {**SKEW_REVERSE, "beta": 0.3}}),
        ({}, {"advantage_mask": {"threshold": 0.3}}),
        ({}, {"advantage_mask": {"threshold": 0.3, "sign": "negative"}}),
        ({}, {"advantage_mask": {"top_fraction": 0.5}}),
        (
            {"advantage_mask": {"threshold": 0.3}},
            {"advantage_mask": {"threshold": 0.3, "per_step": True}},
        ),
        ({}, {"temperature": 2.0}),
        ({}, {"reduction": "sequence_mean"}),
        ({}, {"position_weight": {"name": "linear", "over": 9}}),
        ({}, {"position_weight": {"name": "exponential", "half_life": 4}}),
        ({}, {"position_weight": {"name": "table", "every": 5, "weights": [0.5, 0.2, 1]}}),
        ({}, {"top_k": {"k": 5}}),
        ({"top_k": {"k": 5}}, {"top_k": {"k": 5, "of": "teacher"}}),
        ({"top_k": {"k": 5}}, {"top_k": {"k": 5, "tail": False}}),
        ({}, {"divergence_clip": 4.0}),
        ({}, {"importance_clip": 1.5}),
        ({"importance_clip": 1.5}, {"importance_clip": 0.5}),
    ],
    ids=str,
)
def test_every_setting_changes_the_gradient(
    common: dict[str, Any], settings: dict[str, Any]
) -> None:
    weight = torch.nn.Parameter(torch.randn(61, 8, generator=torch.Generator().manual_seed(1)))
    head = plain_head(weight)
    gradients = []
    for chosen in (common, settings):
        scored = random_tokens(8)
        loss = DistillationLoss(LossConfig.model_validate(chosen))
        loss(scored, head, head, normalizer=20).loss.backward()
        gradients.append(scored.student_hidden.grad)
    assert not torch.allclose(*gradients, rtol=1e-3)


def test_the_advantage_mask_drops_tokens_and_says_which() -> None:
    head = plain_head(torch.randn(61, 8, generator=torch.Generator().manual_seed(1)))
    scored = random_tokens(8)
    settings = LossConfig.model_validate({"advantage_mask": {"threshold": 0.5}})
    output = DistillationLoss(settings)(scored, head, head, normalizer=20)
    output.loss.backward()
    assert output.advantage is not None
    assert torch.equal(output.active, output.advantage.abs() > 0.5)
    assert 0 < output.active.sum() < 20
    assert scored.student_hidden.grad is not None
    assert torch.equal(scored.student_hidden.grad.abs().sum(-1) > 0, output.active)


@pytest.mark.parametrize("per_step", [False, True])
def test_the_top_fraction_is_taken_of_each_rollout(per_step: bool) -> None:
    head = plain_head(torch.randn(61, 8, generator=torch.Generator().manual_seed(1)))
    scored = random_tokens(8)
    settings = {"advantage_mask": {"top_fraction": 0.4, "per_step": per_step}}
    loss = DistillationLoss(LossConfig.model_validate(settings))
    output = loss(scored, head, head, normalizer=20)
    output.loss.backward()
    assert scored.student_hidden.grad is not None
    assert torch.equal(scored.student_hidden.grad.abs().sum(-1) > 0, output.active)
    assert output.advantage is not None
    torchs, exact = (forward_kl_of(scored, head, dtype) for dtype in DTYPES)
    # All tokens are reported, and some count.
    assert_no_worse_than_torch("divergence", output.divergence.detach(), torchs, exact)
    torchs, exact = (kl[output.active].sum() / 20 for kl in (torchs, exact))
    assert_no_worse_than_torch("loss", output.loss.detach(), torchs, exact)
    assert scored.steps is not None
    for rollout, size in ((0, 14), (1, 6)):
        own = scored.rollout_index == rollout
        assert output.active[own].sum() == -(-size * 4 // 10)
        advantage, steps = output.advantage[own], scored.steps[own]
        if per_step:
            means = torch.stack([advantage[steps == step].mean() for step in (0, 1)]).abs()
            kept = output.active[own]
            # The step with the larger mean is filled up before the other one gets any.
            assert kept[steps == means.argmax()].sum() == min(
                kept.sum(), (steps == means.argmax()).sum()
            )
            assert not kept[steps < 0].any()
        else:
            size_of = advantage.abs()
            assert size_of[output.active[own]].min() > size_of[~output.active[own]].max()


def test_sequence_mean_weighs_every_rollout_the_same() -> None:
    head = plain_head(torch.randn(61, 8, generator=torch.Generator().manual_seed(1)))
    scored = random_tokens(8)
    loss = DistillationLoss(LossConfig(reduction="sequence_mean"))
    output = loss(scored, head, head, normalizer=2)
    torchs, exact = (
        (kl[:14].mean() + kl[14:].mean()) / 2
        for kl in (forward_kl_of(scored, head, dtype) for dtype in DTYPES)
    )
    assert_no_worse_than_torch("loss", output.loss.detach(), torchs, exact)
    group = PromptGroup([1], [[1], [1]], [[5] * 14, [5] * 6])
    assert loss.denominator(group) == 2
    assert DistillationLoss(LossConfig()).denominator(group) == 20


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "linear", "over": 4}, [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
        ({"name": "linear", "over": 2, "first": 0, "last": 3}, [0.0, 1.5, 3.0, 3.0, 3.0, 3.0]),
        ({"name": "exponential", "half_life": 2}, [2 ** (-i / 2) for i in range(6)]),
        (
            {"name": "exponential", "half_life": 1, "floor": 0.2},
            [0.2 + 0.8 * 0.5**i for i in range(6)],
        ),
        ({"name": "table", "every": 2, "weights": [0.5, 2]}, [0.5, 0.5, 2.0, 2.0, 2.0, 2.0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "sequence_mean"])
@pytest.mark.parametrize("mask", [None, {"top_fraction": 0.5}])
def test_tokens_are_weighed_by_their_place(
    settings: dict[str, Any], expected: list[float], reduction: str, mask: dict[str, float] | None
) -> None:
    head = plain_head(torch.randn(61, 8, generator=torch.Generator().manual_seed(1)))
    scored = random_tokens(8)
    config = LossConfig.model_validate(
        {"position_weight": settings, "reduction": reduction, "advantage_mask": mask}
    )
    output = DistillationLoss(config)(scored, head, head, normalizer=20)
    output.loss.backward()
    weights = torch.tensor([*expected, *expected[-1:] * 8, *expected], dtype=torch.float64)
    if settings["name"] == "exponential":
        places = torch.arange(14.0, dtype=torch.float64) / settings["half_life"]
        floor = settings.get("floor", 0.0)
        weights[:14] = floor + (1 - floor) * 2**-places
    if reduction == "sequence_mean":
        weights = weights / torch.tensor([14.0] * 14 + [6.0] * 6, dtype=torch.float64)
    results = []
    for dtype in DTYPES:
        hidden = scored.student_hidden.detach().to(dtype).requires_grad_()
        kl = forward_kl_of(replace(scored, student_hidden=hidden), head, dtype)
        loss = (kl * weights.to(dtype))[output.active].sum() / 20
        loss.backward()
        results.append((loss.detach(), hidden.grad))
    (torch_loss, torch_gradient), (loss, gradient) = results
    assert_no_worse_than_torch("loss", output.loss.detach(), torch_loss, loss)
    assert_no_worse_than_torch("gradient", scored.student_hidden.grad, torch_gradient, gradient)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "linear", "over": 4, "first": 0},
        {"name": "table", "every": 2, "weights": [0, 0]},
        {"name": "table", "every": 2, "weights": []},
        {"name": "exponential", "half_life": 0},
    ],
    ids=str,
)
def test_weights_that_teach_nothing_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="position_weight"):
        LossConfig.model_validate({"position_weight": settings})


def test_live_teacher_with_equal_prompts_has_nothing_to_teach(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student = tiny_model("llama")
    groups = [
        PromptGroup(g.student_prompt, [g.student_prompt] * len(g.completions), g.completions)
        for g in ragged_groups
    ]
    scored = score(student, LiveTeacher(), groups)
    head = find_lm_head(student)
    output = DistillationLoss(LossConfig())(scored, head, head, normalizer=1.0)
    # Both passes compute the same logits, packed differently: up to 1e-5, of order 10 in float32. A
    # divergence goes with the square of that, and the loss is its sum over 33 tokens.
    assert output.loss.item() < 1e-7


@pytest.mark.parametrize("mask", [None, {"top_fraction": 0.5}])
def test_a_tolerance_reaches_the_kernels(mask: dict[str, float] | None) -> None:
    generator = torch.Generator().manual_seed(1)
    head = plain_head(3.0 * torch.randn(61, 16, generator=generator))
    for tolerance in (None, 0.3):
        settings = {"gradient_tolerance": tolerance, "advantage_mask": mask}
        loss = DistillationLoss(LossConfig.model_validate(settings))
        output = loss(random_tokens(16), head, head, normalizer=20)
        assert (output.gradient_error is None) == (tolerance is None)
    with pytest.raises(ValueError, match="gradient_tolerance"):
        LossConfig.model_validate({"gradient_tolerance": 1.5})
    with pytest.raises(ValueError, match=r"top_k\) have the exact gradient only"):
        LossConfig.model_validate({"gradient_tolerance": 0.1, "top_k": {"k": 4}})
