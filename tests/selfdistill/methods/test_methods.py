from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast, get_args

import pytest

from selfdistill.config import Config, ConfigError, MethodConfig, ScribeCriticConfig
from selfdistill.critic.build import build_critic
from selfdistill.critic.interface import Critique
from selfdistill.critic.llm import LLMCritic
from selfdistill.methods.build import build_method
from selfdistill.methods.contrast import ContrastLoss
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.methods.environment import feedback
from selfdistill.methods.grpo import GRPOLoss
from selfdistill.methods.method import Method
from selfdistill.methods.refsol import references
from selfdistill.methods.rewarded import RewardedLoss
from selfdistill.methods.stepalign import critiques
from selfdistill.methods.wrong_step import WrongStepLoss
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts, judge
from selfdistill.rollout.engine import Rollout
from selfdistill.tasks.answers import PlainChecker
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.dataset import DatasetTask
from selfdistill.tasks.interface import FeedbackDetail, Problem, Task, Verdict
from selfdistill.training.batch import leave_out

PROBLEMS = [Problem("p", "1 + 2", "3", "reference of p"), Problem("q", "2 + 2", "4", "that of q")]


def rollout(text: str) -> Rollout:
    return Rollout([5, 2], [-0.1, -0.2], text, True)


VERDICT = Verdict("3", True, True, None, None, True)
ATTEMPTS = [
    Attempts(PROBLEMS[0], [rollout("p one"), rollout("p two")], [VERDICT] * 2),
    Attempts(PROBLEMS[1], [rollout("q one")], [VERDICT]),
]


class EchoCritic:
    """Writes down whom it criticised."""

    def critique(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Critique]:
        return [
            Critique("D", f"{problem.id}: {response}", 1)
            for problem, response in zip(problems, responses, strict=True)
        ]


def configured(**settings: object) -> Config:
    return Config.model_validate({"model": "m", "output_dir": "o", **settings})


def built(task: Task, **method: object) -> Method:
    config = configured(method=method)
    return build_method(config.method, task, temperature=1.0, device="cpu", today=None)


def test_stepalign_gives_every_rollout_its_own_critique() -> None:
    contexts = critiques(EchoCritic(), ATTEMPTS)
    texts = [[context.text for context in group] for group in contexts]
    assert texts == [["p: p one", "p: p two"], ["q: q one"]]
    assert {context.kind for group in contexts for context in group} == {"critique"}


def test_a_rollout_without_a_critique_is_left_out_or_sees_the_reference() -> None:
    class SilentCritic:
        def critique(
            self, problems: Sequence[Problem], responses: Sequence[str]
        ) -> list[Critique | None]:
            return [None if "two" in r or "q" in r else Critique("D", r, 1) for r in responses]

    critique = TeacherContext("critique", "p one")
    assert critiques(SilentCritic(), ATTEMPTS) == [[critique, None], [None]]
    with_fallback = partial(critiques, SilentCritic(), fallback="reference")
    solutions = [TeacherContext("reference", problem.reference) for problem in PROBLEMS]
    assert with_fallback(ATTEMPTS) == [[critique, solutions[0]], [solutions[1]]]
    bare = Attempts(replace(PROBLEMS[0], reference=" "), [rollout("two")], [VERDICT])
    assert with_fallback([bare]) == [[None]]


def test_refsol_gives_the_reference_whatever_the_attempt() -> None:
    contexts = references(ATTEMPTS)
    texts = [[context.text for context in group] for group in contexts]
    assert texts == [["reference of p"] * 2, ["that of q"]]
    assert {context.kind for group in contexts for context in group} == {"reference"}


WRONG = Verdict("9", False, False, 2, (0, 1), True)


def group_of(*correct: bool) -> Attempts:
    rollouts = [rollout(f"attempt {i}") for i in range(len(correct))]
    return Attempts(PROBLEMS[0], rollouts, [VERDICT if right else WRONG for right in correct])


def texts_of(contexts: list[list[TeacherContext | None]]) -> list[list[str | None]]:
    return [[context and context.text for context in group] for group in contexts]


def test_peer_shows_another_successful_rollout_and_never_itself() -> None:
    method = built(ArithmeticTask(), name="peer")
    groups = [
        group_of(False, True, False, True),
        group_of(True, False, False, False),
        group_of(False, False, False, False),
    ]
    contexts = method.contexts(groups)
    assert texts_of(contexts) == [
        ["attempt 1", "attempt 3", "attempt 3", "attempt 1"],
        [None, "attempt 0", "attempt 0", "attempt 0"],
        [None] * 4,
    ]
    # It is a solution of the problem, and shown as one.
    assert {c.kind for group in contexts for c in group if c is not None} == {"reference"}
    kept, kept_contexts = leave_out(method, groups, contexts)
    assert [[r.text for r in attempt.rollouts] for attempt in kept] == [
        ["attempt 0", "attempt 1", "attempt 2", "attempt 3"],
        ["attempt 1", "attempt 2", "attempt 3"],
    ]
    assert [len(attempt.verdicts) for attempt in kept] == [4, 3]
    assert texts_of(kept_contexts) == [texts_of(contexts)[0], ["attempt 0"] * 3]


def test_without_need_of_a_context_nothing_is_left_out() -> None:
    groups = [group_of(False, True)]
    method = built(ArithmeticTask(), name="grpo")
    contexts = method.contexts(groups)
    assert texts_of(contexts) == [[None, None]]
    assert leave_out(method, groups, contexts) == (groups, contexts)


@pytest.mark.parametrize(
    ("detail", "right", "wrong", "unfinished"),
    [
        ("answer", "The answer 3 is right.", "The answer 9 is wrong.", "There is no final answer."),
        (
            "step",
            "The answer 3 is right.",
            "Step 2 is wrong. The answer 9 is wrong.",
            "There is no final answer.",
        ),
    ],
)
def test_environment_tells_what_the_checker_found(
    detail: FeedbackDetail, right: str, wrong: str, unfinished: str
) -> None:
    class Silent:
        """A task without words of its own."""

    cut_off = Verdict(None, False, False, None, None, False)
    attempts = Attempts(
        PROBLEMS[0], [rollout(t) for t in ("right", "wrong", "cut")], [VERDICT, WRONG, cut_off]
    )
    contexts = feedback(cast(Task, Silent()), [attempts], detail=detail)
    assert texts_of(contexts) == [[right, wrong, unfinished]]
    assert {c.kind for group in contexts for c in group if c is not None} == {"feedback"}


def test_environment_speaks_the_tasks_own_words() -> None:
    task = ArithmeticTask(step_counts=(3,))
    (problem,) = task.problems(split="train", count=1)
    attempts = judge(task, [problem], [[rollout(problem.reference), rollout("<answer> 00")]])
    texts = {
        detail: texts_of(built(task, name="environment", detail=detail).contexts(attempts))
        for detail in ("answer", "step")
    }
    right = f"<answer> {problem.answer} is right"
    assert texts == {
        "answer": [[right, "<answer> 00 is wrong"]],
        "step": [[right, "<step_1> is wrong <answer> 00 is wrong"]],
    }


def test_a_critic_with_nothing_to_say_leaves_the_rollout_without_context() -> None:
    task = ArithmeticTask(step_counts=(3,))
    (problem,) = task.problems(split="train", count=1)
    attempts = judge(task, [problem], [[rollout(problem.reference), rollout("<answer> 00")]])
    critic = {"name": "scribe", "copying": "omission"}
    method = built(task, name="stepalign", critic=critic)
    assert texts_of(method.contexts(attempts)) == [[None, problem.reference]]


@pytest.mark.parametrize(
    "loss", [{"stop_after_first_wrong_step": True}, {"advantage_mask": {"per_step": True}}]
)
def test_a_task_without_steps_refuses_what_needs_them(loss: dict[str, Any]) -> None:
    class Plain:
        name = "plain"

    (setting,) = loss
    with pytest.raises(ConfigError, match=rf"{setting}.*'plain' does not know the steps"):
        built(cast(Any, Plain()), name="refsol", loss=loss)


SECTIONS = get_args(get_args(MethodConfig)[0])


@pytest.mark.parametrize("name", [section.model_fields["name"].default for section in SECTIONS])
def test_every_method_is_built_from_its_section(name: str) -> None:
    method = built(ArithmeticTask(), name=name, group_size=5)
    assert (method.name, method.group_size) == (name, 5)
    assert method.needs_context == (name not in ("grpo", "wrong_step"))
    losses = {"grpo": GRPOLoss, "wrong_step": WrongStepLoss, "contrast": ContrastLoss}
    assert isinstance(method.loss, losses.get(name, DistillationLoss))
    if name not in losses:  # learns from rewards as well, with and without a context
        method = built(ArithmeticTask(), name=name, group_size=5, reward={})
        assert isinstance(method.loss, RewardedLoss)
        assert not method.needs_context


def test_the_llm_critic_is_built_with_its_engine_and_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = {"name": "server", "base_url": "http://localhost:1/v1", "model": "judge"}
    critic = {"name": "llm", "engine": engine, "fallback": "reference"}
    method = built(ArithmeticTask(), name="stepalign", critic=critic)
    assert isinstance(method.critic, LLMCritic)
    assert method.unusable == Counter()
    monkeypatch.setattr(method.critic, "critique", lambda problems, _: [None] * len(problems))
    method.critic.unusable["no form"] += 2
    assert method.unusable == {"no form": 2}
    assert texts_of(method.contexts(ATTEMPTS)) == [["reference of p"] * 2, ["that of q"]]


def test_the_scribe_corrects_a_wrong_attempt_in_its_own_words() -> None:
    task = ArithmeticTask(step_counts=(3,))
    (problem,) = task.problems(split="train", count=1)
    attempt = problem.reference.rsplit(" ", 1)[0] + " 00"
    assert not task.check(problem, attempt).correct
    attempts = judge(task, [problem], [[rollout(attempt)]])
    ((context,),) = built(task, name="stepalign").contexts(attempts)
    assert context.text == problem.reference


def test_the_scribe_is_refused_for_a_task_whose_steps_it_cannot_write() -> None:
    task = DatasetTask("jsonl", {}, instruction="", checker=PlainChecker())
    with pytest.raises(ConfigError, match=r"method\.critic: the scribe .* the task is jsonl"):
        build_critic(ScribeCriticConfig(), task, device="cpu")
