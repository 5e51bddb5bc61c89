"""What the methods that weigh sampled tokens have in common, and each one's advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from policy_gradients import (
    TASK,
    TEMPERATURE,
    assert_equal_to_plain_torch,
    attempts_at,
    built,
    known,
    own_logprobs,
    sampled,
    solution,
    spoilt,
    surrogate,
)
from tiny_runs import tiny_config
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

import selfdistill.training.loop
from selfdistill.config import Config, ConfigError, GroupRewards, LossConfig
from selfdistill.critic.interface import Critique
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.methods.rewarded import RewardedLoss
from selfdistill.methods.wrong_step import WrongStepLoss, blamed
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import find_lm_head
from selfdistill.model.scoring import score
from selfdistill.model.teacher import BaseTeacher
from selfdistill.rollout.attempts import judge
from selfdistill.rollout.engine import Rollout
from selfdistill.tasks.interface import Problem
from selfdistill.training.solver import load_solver

ModelFactory = Callable[..., PreTrainedModel]


def test_rewards_and_a_teacher_in_one_loss_equal_plain_torch(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student, base = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    groups = known(ragged_groups, [[1.0, 0.0, 0.0], [0.0, 1.0]])
    # One rollout without context: its reward alone counts.
    shown = [list(groups[0].teacher_prompts), groups[1].teacher_prompts]
    shown[0][2] = groups[0].student_prompt
    groups[0] = replace(groups[0], teacher_prompts=shown[0])

    def plain(student: PreTrainedModel, base: PreTrainedModel) -> Tensor:
        total = torch.zeros(())
        for group in groups:
            rewards = torch.tensor(group.rewards)
            advantages = (rewards - rewards.mean()) / rewards.std()
            for i, completion in enumerate(group.completions):
                logprobs = own_logprobs(student, group.student_prompt, completion)
                old = cast(Any, group.old_logprobs)[i]
                own = surrogate(sampled(logprobs, completion), old, advantages[i])
                total = total - 0.7 * own.sum()
                if group.teacher_prompts[i] == group.student_prompt:
                    continue
                with torch.no_grad():
                    target = own_logprobs(base, group.teacher_prompts[i], completion)
                kl = kl_div(logprobs, target, log_target=True, reduction="none").sum(-1)
                advantage = sampled(target - logprobs.detach(), completion)
                total = total + kl[advantage.abs() > 1.0].sum()
        return total / 100

    settings = {"temperature": TEMPERATURE, "advantage_mask": {"threshold": 1.0}}
    loss = RewardedLoss(
        DistillationLoss(LossConfig.model_validate(settings)),
        GroupRewards(coefficient=0.7),
        temperature=TEMPERATURE,
    )
    scored = score(student, BaseTeacher(base), groups)
    output = loss(scored, find_lm_head(student), find_lm_head(base), normalizer=100)
    output.loss.backward()
    assert_equal_to_plain_torch(output.loss, student, base, plain)
    silent = scored.rollout_index == 2
    assert not output.divergence[silent].any()
    assert output.divergence[~silent].all()
    assert output.active[silent].any()
    assert loss.denominator(groups[0]) == groups[0].num_tokens


@pytest.mark.parametrize("mask", [{"top_fraction": 0.5}, {"top_fraction": 0.5, "per_step": True}])
def test_a_share_of_the_tokens_is_taken_of_rollouts_with_context_only(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], mask: dict[str, Any]
) -> None:
    student = tiny_model("llama")
    (group,) = known(ragged_groups[1:], [[1.0, 1.0]])
    steps = [[0] * len(completion) for completion in group.completions]
    prompts = [group.student_prompt, group.teacher_prompts[1]]
    group = replace(group, steps=steps, teacher_prompts=prompts)
    loss = RewardedLoss(
        DistillationLoss(LossConfig.model_validate({"advantage_mask": mask})),
        GroupRewards(),
        temperature=1.0,
    )
    scored = score(student, BaseTeacher(tiny_model("llama", seed=1)), [group])
    head = find_lm_head(student)
    active = loss(scored, head, head, normalizer=1.0).active
    assert active[scored.rollout_index == 0].sum() == 0
    assert active[scored.rollout_index == 1].sum() == -(-len(group.completions[1]) // 2)
    # Nothing is read where neither term has anything to say.
    assert loss.learns_from(group)
    assert not loss.learns_from(replace(group, teacher_prompts=[group.student_prompt] * 2))


def test_the_penalty_on_the_wrong_step_equals_plain_torch(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student = tiny_model("llama")
    groups = known(ragged_groups, [[0.0, 0.0, 0.0], [0.0, 0.0]])

    def plain(student: PreTrainedModel, _: PreTrainedModel) -> Tensor:
        total = torch.zeros(())
        for group in groups:
            for i, completion in enumerate(group.completions):
                logprobs = own_logprobs(student, group.student_prompt, completion)
                old = cast(Any, group.old_logprobs)[i]
                own = surrogate(sampled(logprobs, completion), old, -0.5)
                total = total - own[torch.tensor(cast(Any, group.wrong)[i])].sum()
        return total / 33

    loss = WrongStepLoss(penalty=0.5, temperature=TEMPERATURE, clip_low=0.2, clip_high=0.2)
    scored = score(student, None, groups)
    head = find_lm_head(student)
    output = loss(scored, head, head, normalizer=33)
    output.loss.backward()
    assert_equal_to_plain_torch(output.loss, student, student, plain)
    assert output.advantage is not None
    assert scored.wrong is not None
    assert torch.equal(output.advantage == -0.5, scored.wrong)
    assert output.active.sum() < len(scored.targets)
    right = replace(groups[0], wrong=[[False] * len(c) for c in groups[0].completions])
    assert loss.learns_from(groups[0])
    assert not loss.learns_from(right)
    with pytest.raises(ValueError, match=r"wrong is missing"):
        loss(replace(scored, wrong=None), head, head, normalizer=1.0)


def test_the_critic_says_which_step_is_blamed() -> None:
    one, two, three, answer = solution()
    wrong = " ".join([one, spoilt(two), three, answer[:-2] + "00"])
    cut = f"{one} {two[:9]}"
    method = built(TASK, name="wrong_step")
    ((bad, good, unfinished),) = method.contexts(attempts_at(wrong, " ".join(solution()), cut))
    assert bad is not None
    assert bad.wrong_span is not None
    assert wrong[slice(*bad.wrong_span)].strip() == spoilt(two)
    assert [context and context.wrong_span for context in (good, unfinished)] == [None, None]

    class Mistaken:
        """Blames what the checker does not, and steps that are not there."""

        def __init__(self, *critiques: Critique | None) -> None:
            self.critiques = critiques

        def critique(self, problems: Sequence[Problem], responses: Sequence[str]) -> Any:
            return self.critiques

    critic = Mistaken(Critique("D", "t", 3), Critique("D", "t", 9), Critique("B", "t", 1), None)
    (found,) = blamed(TASK, cast(Any, critic), attempts_at(*[wrong] * 4))
    assert found[0] is not None
    assert wrong[slice(*cast(Any, found[0].wrong_span))].strip() == three
    assert [context and context.wrong_span for context in found[1:]] == [None] * 3


def test_blamed_tokens_are_those_of_the_step(solver_dir: Path) -> None:
    config = tiny_config(
        solver_dir, solver_dir / "run", task={"step_counts": [3]}, method={"name": "wrong_step"}
    )
    solver = load_solver(config)
    one, two, three, answer = solution()
    text = " ".join([one, spoilt(two), three, answer[:-2] + "00"])
    tokens = solver.tokenizer(text, add_special_tokens=False)["input_ids"]
    (problem,) = TASK.problems(split="train", count=1)
    attempts = judge(solver.task, [problem], [[Rollout(tokens, [-1.0] * len(tokens), text, True)]])
    method = solver.build_method(config.method)
    batch = selfdistill.training.loop.build_batch(
        solver, method, attempts, method.contexts(attempts), too_long="error"
    )
    (group,) = batch.groups
    assert group.teacher_prompts == [group.student_prompt]  # nobody reads the critique
    assert group.wrong is not None
    blamed_tokens = [token for token, wrong in zip(tokens, group.wrong[0], strict=True) if wrong]
    assert solver.tokenizer.decode(blamed_tokens).split() == spoilt(two).split()


LLM = {
    "name": "llm",
    "engine": {"name": "server", "base_url": "http://localhost:1/v1", "model": "judge"},
    "fallback": "reference",
}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "stepalign", "group_size": 1, "reward": {}}, r"reward: .* group_size is 1"),
        (
            {"name": "refsol", "reward": {}, "loss": {"reduction": "sequence_mean"}},
            r"reward: .* loss.reduction is sequence_mean",
        ),
        ({"name": "refsol", "reward": {"coefficient": 0}}, r"coefficient"),
        ({"name": "wrong_step", "penalty": -1.0}, r"penalty"),
        (
            {"name": "wrong_step", "critic": {"name": "scribe", "copying": "omission"}},
            r"critic\.copying: only the place",
        ),
        (
            {"name": "wrong_step", "critic": {"name": "scribe", "error_rate": 0.2}},
            r"critic\.error_rate: only the place",
        ),
        ({"name": "wrong_step", "critic": LLM}, r"critic\.fallback: nobody reads"),
        ({"name": "contrast", "critic": LLM}, r"critic\.fallback: a critique is compared"),
        ({"name": "contrast", "weight": 1.5}, r"weight"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name(method: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"model": "m", "output_dir": "o", "method": method})


def test_the_scribe_blames_steps_of_the_arithmetic_task_only() -> None:
    task = {"name": "python", "file": "mine.py"}
    with pytest.raises(ValueError, match=r"method\.critic: the scribe writes steps of the arith"):
        Config.model_validate(
            {"model": "m", "output_dir": "o", "task": task, "method": {"name": "wrong_step"}}
        )

    class Plain:
        name = "plain"

    with pytest.raises(ConfigError, match="wrong_step: the task 'plain' does not know the steps"):
        built(cast(Any, Plain()), name="wrong_step")
