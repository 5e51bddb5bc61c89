"""The log-probs that a loss compares with are those of the policy that sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness import assert_no_worse_than_torch
from padded_step import in_float64
from tiny_runs import lines
from tiny_tokenizers import byte_level
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from selfdistill.config import Config
from selfdistill.model.lm_head import find_lm_head
from selfdistill.rollout.engine import Rollout, SamplingParams, completion_text, stop_place
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.training.agreement import (
    EngineMismatchError,
    check_agreement,
    with_own_logprobs,
)
from selfdistill.training.loop import train
from selfdistill.training.solver import load_solver

PROMPTS = [[1, 4, 9, 10, 11, 12, 5], [1, 4, 8, 5]]
CUTS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.4},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
]


@torch.no_grad()
def policy(model: LlamaForCausalLM, rollout: Rollout, temperature: float) -> torch.Tensor:
    """Log-probs of a rollout after the first prompt, with nothing cut off."""
    ids = torch.tensor([PROMPTS[0] + rollout.token_ids])
    scores = (model(ids).logits[0, len(PROMPTS[0]) - 1 : -1] / temperature).log_softmax(-1)
    return scores.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("says", [True, False], ids=["the engine says", "the trainer reads"])
def test_importance_ratios_are_one_before_the_first_update(
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    cut: dict[str, Any],
    says: bool,
) -> None:
    model, params = make_model(), SamplingParams(**{"max_new_tokens": 16, "seed": 2, **cut})
    engine = TransformersEngine(model, tokenizer)
    groups = engine.generate(PROMPTS[:1], group_size=4, params=params)
    if not says:  # as vLLM: log-probs of what was sampled from, and nothing else
        silent = [[replace(rollout, log_kept=None) for rollout in group] for group in groups]
        head = find_lm_head(model)
        temperature = params.temperature
        groups = with_own_logprobs(model, head, PROMPTS[:1], silent, temperature=temperature)
    for rollout in groups[0]:
        torchs, exact = (
            policy(own, rollout, params.temperature) for own in (model, in_float64(model))
        )
        # The sum of two float32 numbers, each rounded.
        old = torch.tensor(rollout.policy_logprobs)
        assert_no_worse_than_torch("old log-probs", old, torchs, exact)
        if params.truncates:
            assert rollout.log_kept is not None
            assert min(rollout.log_kept) < -0.01
            assert max(rollout.log_kept) < 1e-5


@pytest.mark.parametrize("cut", CUTS[1:], ids=str)
def test_an_engine_that_cuts_off_is_checked(
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    cut: dict[str, Any],
) -> None:
    model, params = make_model(), SamplingParams(**{"max_new_tokens": 16, "seed": 2, **cut})
    groups = TransformersEngine(model, tokenizer).generate(PROMPTS, group_size=4, params=params)
    head = find_lm_head(model)
    assert check_agreement(model, head, PROMPTS, groups, params=params, tolerance=1e-4) <= 1e-4
    # An engine that ignores what it was asked to cut off, and one with other weights.
    whole = replace(params, top_k=0, top_p=1.0, min_p=0.0)
    other = TransformersEngine(model, tokenizer).generate(PROMPTS, group_size=4, params=whole)
    with pytest.raises(EngineMismatchError):
        check_agreement(model, head, PROMPTS, other, params=params, tolerance=1e-4)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.add_(0.05)
    with pytest.raises(EngineMismatchError):
        check_agreement(model, head, PROMPTS, groups, params=params, tolerance=1e-4)


def test_stop_strings_end_a_completion(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = TransformersEngine(make_model(), tokenizer)
    params = SamplingParams(max_new_tokens=24, seed=4)
    (free,) = engine.generate(PROMPTS[:1], group_size=6, params=params)
    text = max((rollout.text for rollout in free), key=len)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    (stopped,) = engine.generate(
        PROMPTS[:1], group_size=6, params=replace(params, stop=("never", stop))
    )
    ended = 0
    for whole, rollout in zip(free, stopped, strict=True):
        if stop not in whole.text:
            assert (rollout.token_ids, rollout.text) == (whole.token_ids, whole.text)
            continue
        ended += 1
        size = len(rollout.token_ids)
        assert rollout.finished
        assert rollout.token_ids == whole.token_ids[:size]
        assert len(rollout.logprobs) == size
        assert rollout.text == completion_text(tokenizer, rollout.token_ids)
        assert stop in rollout.text
        assert stop not in completion_text(tokenizer, rollout.token_ids[:-1])
    assert ended


@pytest.mark.parametrize(
    ("stop", "kept"), [("。", "答え。"), ("え", "答え"), ("x", "答え。x"), ("y", None)]
)
def test_a_stop_string_may_end_in_a_character_of_several_tokens(
    stop: str, kept: str | None
) -> None:
    # A token is a byte, and the bytes of half a character decode to a character as well.
    tokens = byte_level()("答え。x").input_ids
    place = None if kept is None else len(kept.encode())
    assert stop_place(byte_level(), tokens, ["never", stop]) == place


def test_evaluations_sample_as_they_are_told(solver_dir: Path, tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": tmp_path / "run",
            "device": "cpu",
            "task": {"step_counts": [1]},
            "method": {"name": "refsol", "group_size": 2},
            "steps": 1,
            "prompts_per_step": 2,
            "rollout": {"max_new_tokens": 6, "top_k": 3, "temperature": 1.2},
            "evaluation": {"problems": 2, "samples": 3, "sampling": {"temperature": 0}},
        }
    )
    (attempt, _) = load_solver(config).attempt(split="dev", problems=2, samples=3, seed=0)
    assert len({tuple(rollout.token_ids) for rollout in attempt.rollouts}) == 1  # greedy
    train(config)
    assert lines(tmp_path / "run", "metrics.jsonl")[0]["taught"]
