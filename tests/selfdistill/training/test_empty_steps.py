"""What is said about steps that taught nothing: after what the method learns from."""

from __future__ import annotations

from typing import Any

import pytest

from selfdistill.config import Config
from selfdistill.training.empty_steps import advice, describe

NO_FORM = "the answer does not have the form"
LLM = {"name": "llm", "engine": {"name": "server", "base_url": "http://host", "model": "judge"}}


def config_of(**method: Any) -> Config:
    settings = {"model": "m", "output_dir": "o", "prompts_per_step": 2}
    return Config.model_validate({**settings, "method": {"group_size": 2, **method}})


def step(*, dropped: int = 0, unusable: int = 0) -> dict[str, Any]:
    reasons = {NO_FORM: unusable} if unusable else {}
    return {"dropped": dropped, "too_long": 0, "unusable": reasons}


@pytest.mark.parametrize("method", [{"name": "wrong_step"}, {"name": "stepalign", "reward": {}}])
def test_a_critic_without_usable_answers_is_named_where_no_rollout_was_dropped(
    method: dict[str, Any],
) -> None:
    empty = [step(unusable=4)] * 2
    config = config_of(**method, critic=LLM)
    assert f"; 8 of the critic's answers were no critique (8: {NO_FORM})" in describe(config, empty)
    assert advice(config, empty).startswith("Look at what the critic answers")
    dropped = [step(dropped=4, unusable=4)]
    assert describe(config_of(name="stepalign", critic=LLM), dropped) == (
        f"of 4 rollouts 4 had nothing to show to the teacher (4: {NO_FORM})"
    )


@pytest.mark.parametrize(
    ("method", "why", "todo"),
    [
        ({"name": "grpo"}, "all rewards of a prompt are equal", "sometimes solved"),
        ({"name": "wrong_step"}, "no critique names a wrong step", "Choose harder problems"),
        ({"name": "contrast"}, "the two critiques of each attempt say the same", "the critic"),
        (
            {"name": "refsol", "reward": {}},
            "all rewards of a prompt are equal, and no token was compared with the teacher",
            "sometimes solved",
        ),
        (
            {"name": "refsol", "loss": {"token_selection": {"rule": "entropy", "share": 0.1}}},
            "the token selection keeps none",
            "Raise method.loss.token_selection.share",
        ),
        (
            {"name": "refsol", "loss": {"advantage_mask": {"threshold": 9}}},
            "the advantage mask keeps none",
            "Lower method.loss.advantage_mask.threshold",
        ),
        (
            {"name": "refsol"},
            "no token was compared with the teacher",
            "Look at what the student writes",
        ),
    ],
    ids=str,
)
def test_each_method_has_its_own_reason_and_advice(
    method: dict[str, Any], why: str, todo: str
) -> None:
    config = config_of(**method)
    assert describe(config, [step()]) == f"of 4 rollouts 4 gave no signal ({why})"
    assert todo in advice(config, [step()])
