"""The contrast of two critiques: its advantages, and who is contrasted with what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from padded_step import padded_hidden
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
from torch import Tensor
from transformers import PreTrainedModel

from selfdistill.config import Config
from selfdistill.critic.interface import Critique
from selfdistill.methods.contrast import ContrastLoss, with_others, with_wrong, wrong_critique
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import find_lm_head
from selfdistill.model.scoring import score
from selfdistill.model.teacher import BaseTeacher, LiveTeacher
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import Problem

ModelFactory = Callable[..., PreTrainedModel]


def contrasted(groups: Sequence[PromptGroup]) -> list[PromptGroup]:
    """The groups with the contexts of their last rollout first as those to subtract."""
    return [replace(group, contrast_prompts=group.teacher_prompts[::-1]) for group in groups]


@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_the_contrast_equals_plain_torch(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], weight: float
) -> None:
    student, base = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    groups = contrasted(known(ragged_groups, [[0.0, 0.0, 0.0], [0.0, 0.0]]))

    def plain(student: PreTrainedModel, base: PreTrainedModel) -> Tensor:
        total = torch.zeros(())
        for group in groups:
            for i, completion in enumerate(group.completions):
                own = sampled(own_logprobs(student, group.student_prompt, completion), completion)
                with torch.no_grad():
                    right, other = (
                        sampled(own_logprobs(base, prompts[i], completion), completion)
                        for prompts in (group.teacher_prompts, cast(Any, group.contrast_prompts))
                    )
                gaps = right - own.detach(), other - own.detach()
                advantage = gaps[0] - weight * gaps[1]
                total = total - surrogate(own, cast(Any, group.old_logprobs)[i], advantage).sum()
        return total / 33

    loss = ContrastLoss(weight=weight, temperature=TEMPERATURE, clip_low=0.2, clip_high=0.2)
    scored = score(student, BaseTeacher(base), groups)
    output = loss(scored, find_lm_head(student), find_lm_head(base), normalizer=33)
    output.loss.backward()
    assert_equal_to_plain_torch(output.loss, student, base, plain)
    head = find_lm_head(student)
    with pytest.raises(ValueError, match="contrast_hidden is missing"):
        loss(replace(scored, contrast_hidden=None), head, head, normalizer=1.0)


def test_equal_critiques_say_nothing(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student = tiny_model("llama")
    groups = [
        replace(group, contrast_prompts=group.teacher_prompts)
        for group in known(ragged_groups, [[0.0] * 3, [0.0] * 2])
    ]
    loss = ContrastLoss(weight=1.0, temperature=1.0, clip_low=0.2, clip_high=0.2)
    head = find_lm_head(student)
    output = loss(score(student, LiveTeacher(), groups), head, head, normalizer=1.0)
    assert output.advantage is not None
    assert output.advantage.abs().max() < 1e-4  # both are read, at other places of one row


@pytest.mark.parametrize("teacher", ["live", "base"])
def test_both_judgements_come_from_one_row(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], teacher: str
) -> None:
    student, base = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    groups = contrasted(ragged_groups)
    model = student if teacher == "live" else base
    scored = score(student, LiveTeacher() if teacher == "live" else BaseTeacher(base), groups)
    completions = [c for group in groups for c in group.completions]
    for found, prompts in (
        (scored.teacher_hidden, [p for g in groups for p in g.teacher_prompts]),
        (scored.contrast_hidden, [p for g in groups for p in cast(Any, g.contrast_prompts)]),
    ):
        with torch.no_grad():
            expected = padded_hidden(model, prompts, completions)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert scored.statistics.packed_tokens < scored.statistics.unshared_tokens


def test_a_wrong_critique_takes_right_for_wrong_and_wrong_for_right() -> None:
    one, two, three, answer = solution()
    wrong = " ".join([one, spoilt(two), three, answer[:-2] + "00"])
    right, cut = " ".join(solution()), f"{one} {two[:9]}"
    method = built(TASK, name="contrast")
    ((of_wrong, of_right, of_cut),) = method.contexts(attempts_at(wrong, right, cut))
    assert of_wrong is not None
    assert (of_wrong.text, of_wrong.contrast) == (" ".join([one, *solution()[1:]]), wrong)
    assert of_right is not None
    assert of_right.text == right
    assert of_right.contrast is not None
    (problem,) = TASK.problems(split="train", count=1)
    verdict = TASK.check(problem, of_right.contrast)
    assert verdict.complete
    assert not verdict.strict
    assert of_cut is None  # there is nothing to take for right
    assert method.needs_context  # so it is left out

    class Plain:
        """A task that cannot write mistakes."""

    critique = Critique("A", right, None)
    assert wrong_critique(cast(Any, Plain()), problem, right, critique) is None

    class Silent:
        def critique(self, problems: Sequence[Problem], responses: Sequence[str]) -> Any:
            return [None] * len(problems)

    assert with_wrong(TASK, cast(Any, Silent()), attempts_at(right)) == [[None]]


def test_another_critique_is_that_of_the_next_problem_on_any_number_of_ranks() -> None:
    problems = [Problem(name, "1 + 2", "3", "") for name in "pqrp"]
    texts = [["p0", None], ["q0", "q1"], [None, None], ["p2", "p3"]]
    attempts = [Attempts(problem, [], []) for problem in problems]
    contexts = [[text and TeacherContext("critique", text) for text in group] for group in texts]

    def contrasts(gather: Any, *places: int) -> list[list[str | None]]:
        found = with_others([attempts[i] for i in places], [contexts[i] for i in places], gather)
        return [[context and context.contrast for context in group] for group in found]

    expected = [["q0", None], ["p2", "p3"], [None, None], ["q0", "q1"]]
    assert contrasts(list, 0, 1, 2, 3) == expected
    everyones: list[Any] = []
    partial(with_others, attempts, contexts)(lambda own: everyones.extend(own) or own)
    assert contrasts(lambda own: everyones, 0, 1) == expected[:2]
    assert contrasts(lambda own: everyones, 2, 3) == expected[2:]
    # Alone in its step, a problem has no other.
    assert contrasts(list, 1) == [[None, None]]
    assert built(TASK, name="contrast", against="other").complete is with_others


def test_alone_in_its_step_a_problem_is_refused_where_the_other_critique_is_anothers() -> None:
    settings = {"model": "m", "output_dir": "o", "prompts_per_step": 1}
    method = {"name": "contrast", "against": "other"}
    with pytest.raises(ValueError, match=r"prompts_per_step: got 1, and method\.against: other"):
        Config.model_validate({**settings, "method": method})
    Config.model_validate({**settings, "method": {**method, "against": "wrong"}})
    Config.model_validate({**settings, "method": method, "prompts_per_step": 2})
