"""Tokens chosen by entropy and divergence: which, with which gradient, and at which cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from scored_tokens import plain_head, random_tokens

from selfdistill.config import LossConfig, TokenSelectionConfig
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.model.scoring import ScoredTokens
from selfdistill_kernels import DistillationOutput
from selfdistill_kernels.integrations import fused_head_distillation

LENGTHS = (14, 6)  # of the two rollouts of `random_tokens`


def head() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(61, 8, generator=torch.Generator().manual_seed(1)))


def run(loss: DistillationLoss, scored: ScoredTokens, weight: torch.Tensor) -> DistillationOutput:
    output = loss(scored, plain_head(weight), plain_head(weight), normalizer=20.0)
    output.loss.backward()
    return output


def selecting(rule: str, share: float) -> DistillationLoss:
    return DistillationLoss(
        LossConfig(token_selection=TokenSelectionConfig(rule=rule, share=share))
    )


# All of the share leaves the half of which the student is unsure out, too.
@pytest.mark.parametrize(
    ("rule", "share"), [("entropy", 0.2), ("confident", 0.1), ("confident", 1.0)]
)
def test_the_rule_chooses_within_each_rollout_and_the_rest_has_no_gradient(
    rule: str, share: float
) -> None:
    scored, weight = random_tokens(8), head()
    dense = run(DistillationLoss(LossConfig()), scored, weight)
    whole = scored.student_hidden.grad
    sparse_tokens = replace(scored, student_hidden=scored.student_hidden.detach().requires_grad_())
    output = run(selecting(rule, share), sparse_tokens, weight)

    expected = []
    for entropy, divergence in zip(
        dense.entropy.split(LENGTHS), dense.divergence.split(LENGTHS), strict=True
    ):
        count = -int(-share * len(entropy) // 1)
        order = entropy.argsort(descending=True)
        if rule == "confident":
            half = order[len(order) // 2 :]
            order = half[divergence[half].argsort(descending=True)]
        expected.append(
            torch.zeros(len(entropy), dtype=torch.bool).index_fill(0, order[:count], True)
        )
    assert torch.equal(output.active, torch.cat(expected))
    assert output.loss.item() == pytest.approx(dense.divergence[output.active].sum().item() / 20)
    gradient = sparse_tokens.student_hidden.grad
    assert gradient is not None
    assert whole is not None
    torch.testing.assert_close(gradient[output.active], whole[output.active])
    assert not gradient[~output.active].any()
    torch.testing.assert_close(output.entropy, dense.entropy)  # of all tokens, for the log


@pytest.mark.parametrize(
    ("rule", "share", "compared"), [("entropy", 0.2, [5]), ("confident", 0.1, [20, 3])]
)
def test_the_teacher_is_compared_on_chosen_tokens_alone(
    rule: str, share: float, compared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked rows are not visited by the kernels, so these numbers are what a step costs."""
    seen: list[tuple[int, bool]] = []

    def record(hidden: torch.Tensor, *rest: Any, **named: Any) -> DistillationOutput:
        mask = named.get("mask")
        tokens = len(hidden) if mask is None else int(mask.sum())
        seen.append((tokens, torch.is_grad_enabled()))
        return fused_head_distillation(hidden, *rest, **named)

    monkeypatch.setattr("selfdistill.methods.distillation.fused_head_distillation", record)
    run(selecting(rule, share), random_tokens(8), head())
    assert [tokens for tokens, _ in seen] == compared
    assert [learns for _, learns in seen] == [False] * (len(seen) - 1) + [True]


@pytest.mark.parametrize("rule", ["entropy", "confident"])
def test_tokens_that_are_not_compared_are_not_chosen(rule: str) -> None:
    """Such as those of rollouts without context, beside rewards."""
    mask = torch.arange(20) >= LENGTHS[0]
    weight = plain_head(head())
    output = selecting(rule, 0.5)(random_tokens(8), weight, weight, normalizer=1.0, mask=mask)
    assert output.active.any()
    assert not output.active[~mask].any()


def test_two_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="token_selection chooses tokens, and so does"):
        LossConfig(token_selection={"rule": "entropy", "share": 0.2}, advantage_mask={})
