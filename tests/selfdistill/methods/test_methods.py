from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from selfdistill.config import Config, LossConfig
from selfdistill.context import TeacherContext
from selfdistill.critic import Critique
from selfdistill.critic.llm import LLMCritic
from selfdistill.evaluate import Attempts, judge
from selfdistill.methods import RefSol, StepAlign, build_method
from selfdistill.methods.loss import DistillationLoss
from selfdistill.rollout import Rollout
from selfdistill.tasks import Problem, Verdict
from selfdistill.tasks.arithmetic import ArithmeticTask

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


def test_stepalign_gives_every_rollout_its_own_critique() -> None:
    loss = DistillationLoss(LossConfig())
    method = StepAlign(critic=EchoCritic(), group_size=2, loss=loss)
    contexts = method.contexts(ATTEMPTS)
    texts = [[context.text for context in group] for group in contexts]
    assert texts == [["p: p one", "p: p two"], ["q: q one"]]
    assert {context.kind for group in contexts for context in group} == {"critique"}


def test_a_rollout_without_a_critique_is_left_out_or_sees_the_reference() -> None:
    class SilentCritic:
        def critique(
            self, problems: Sequence[Problem], responses: Sequence[str]
        ) -> list[Critique | None]:
            return [None if "two" in r or "q" in r else Critique("D", r, 1) for r in responses]

    loss = DistillationLoss(LossConfig())
    method = StepAlign(critic=SilentCritic(), group_size=2, loss=loss)
    critique = TeacherContext("critique", "p one")
    assert method.contexts(ATTEMPTS) == [[critique, None], [None]]
    method = StepAlign(critic=SilentCritic(), group_size=2, loss=loss, fallback="reference")
    references = [TeacherContext("reference", problem.reference) for problem in PROBLEMS]
    assert method.contexts(ATTEMPTS) == [[critique, references[0]], [references[1]]]
    bare = Attempts(replace(PROBLEMS[0], reference=" "), [rollout("two")], [VERDICT])
    assert method.contexts([bare]) == [[None]]


def test_refsol_gives_the_reference_whatever_the_attempt() -> None:
    method = RefSol(group_size=2, loss=DistillationLoss(LossConfig()))
    contexts = method.contexts(ATTEMPTS)
    texts = [[context.text for context in group] for group in contexts]
    assert texts == [["reference of p"] * 2, ["that of q"]]
    assert {context.kind for group in contexts for context in group} == {"reference"}


@pytest.mark.parametrize(("name", "kind"), [("stepalign", StepAlign), ("refsol", RefSol)])
def test_methods_are_built_from_their_name(name: str, kind: type) -> None:
    config = configured(method={"name": name, "group_size": 5})
    method = build_method(config, ArithmeticTask())
    assert isinstance(method, kind)
    assert (method.name, method.group_size) == (name, 5)


def test_the_llm_critic_is_built_with_its_engine_and_fallback() -> None:
    engine = {"name": "server", "base_url": "http://localhost:1/v1", "model": "judge"}
    critic = {"name": "llm", "engine": engine, "fallback": "reference"}
    config = configured(method={"name": "stepalign", "critic": critic})
    method = build_method(config, ArithmeticTask())
    assert isinstance(method, StepAlign)
    assert isinstance(method.critic, LLMCritic)
    assert method.fallback == "reference"


def test_the_scribe_corrects_a_wrong_attempt_in_its_own_words() -> None:
    task = ArithmeticTask(step_counts=(3,))
    (problem,) = task.problems(split="train", count=1)
    attempt = problem.reference.rsplit(" ", 1)[0] + " 00"
    assert not task.check(problem, attempt).correct
    attempts = judge(task, [problem], [[rollout(attempt)]])
    ((context,),) = build_method(configured(), task).contexts(attempts)
    assert context.text == problem.reference
