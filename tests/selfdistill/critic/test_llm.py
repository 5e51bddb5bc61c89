from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pytest

from selfdistill.critic.interface import Critique
from selfdistill.critic.llm import CritiqueError, LLMCritic, parse_critique, strip_thinking
from selfdistill.critic.textgen.interface import Generation
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.interface import Problem, Verdict, check_all

TASK = ArithmeticTask(step_counts=(3,))
(PROBLEM,) = TASK.problems(split="dev", count=1)
RESPONSE = "<step_1> 1 + 1 = 2\n<step_2> 2 + 2 = 5"


def answer(case: str, change: object, text: str) -> str:
    return f"<case>{case}</case>\n<first_change>{change}</first_change>\n<text>\n{text}\n</text>\n"


class Scripted:
    """Says what it was told to, and writes down what it was asked."""

    identity = "scripted"

    def __init__(self, *answers: str) -> None:
        self.answers = answers
        self.prompts: list[str] = []

    def generate(self, prompts: Sequence[str]) -> Iterator[tuple[int, Generation]]:
        self.prompts.extend(prompts)
        for place in reversed(range(len(prompts))):
            yield place, Generation(self.answers[place], True)


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("plain", "plain"),
        ("<think>a\nb</think>\nc", "\nc"),
        ("opened by the template</think>c", "c"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<think>a</think>b<think>never closed", ""),
        ("<think>never closed", ""),
    ],
)
def test_think_parts_are_stripped(text: str, rest: str) -> None:
    assert strip_thinking(text) == rest


def test_the_four_cases_are_read() -> None:
    for case, change in (("B", 2), ("C", 3), ("D", 1)):
        critique = parse_critique(answer(case, change, "<step_1> new"), RESPONSE)
        assert critique == Critique(case, "<step_1> new", change)
    thought = "<think><case>D</case> or not?</think>" + answer("A", 0, "copied with a slip")
    assert parse_critique(thought, RESPONSE) == Critique("A", RESPONSE, None)


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        "The attempt is right.",
        "<think>" + answer("D", 1, "never said"),
        "Sure! " + answer("D", 1, "x"),
        answer("D", 1, "x") + "I hope this helps",
        answer("E", 1, "x"),
        answer("A, B", 1, "x"),
        answer("d", 1, "x"),
        answer("D", "two", "x"),
        answer("D", -1, "x"),
        answer("D", 0, "x"),
        answer("A", 2, "x"),
        answer("D", 1, " \n"),
        answer("D", 1, "x").removesuffix("</text>\n"),
        answer("D", 1, "x") + answer("D", 1, "y"),
        answer("D", 1, "x\n</text>\n<text>\ny"),
        answer("D", 1, "x").replace("<first_change>1</first_change>", ""),
    ],
)
def test_everything_else_is_nonsense(nonsense: str) -> None:
    with pytest.raises(CritiqueError):
        parse_critique(nonsense, RESPONSE)


def test_an_empty_attempt_has_no_copy() -> None:
    with pytest.raises(CritiqueError, match="empty"):
        parse_critique(answer("A", 0, "x"), " ")


def test_each_attempt_gets_its_own_critique_or_none() -> None:
    generator = Scripted(answer("D", 1, "one"), "nonsense", answer("C", 3, "three"))
    critic = LLMCritic(generator)
    critiques = critic.critique([PROBLEM] * 3, ["a {x}", "b", "c"])
    assert critiques == [Critique("D", "one", 1), None, Critique("C", "three", 3)]
    for prompt, response in zip(generator.prompts, ["a {x}", "b", "c"], strict=True):
        assert f"<question>\n{PROBLEM.question}\n</question>" in prompt
        assert prompt.endswith(f"<attempt>\n{response}\n</attempt>\n")
        assert PROBLEM.reference not in prompt
    with pytest.raises(ValueError, match="zip"):
        critic.critique([PROBLEM], [])


def test_the_reference_is_shown_on_demand() -> None:
    critic = LLMCritic(Scripted(), show_reference=True)
    assert PROBLEM.reference in critic.prompt(PROBLEM, "a")
    without = Problem(id="p", question="q", answer="1", reference="")
    assert "<solution>" not in critic.prompt(without, "a")


def test_the_critiques_of_a_step_are_judged_at_once() -> None:
    judged: list[int] = []

    def check(attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        judged.append(len(attempts))
        return check_all(TASK, attempts)

    answers = [answer("D", 1, PROBLEM.reference), "no critique", answer("D", 1, PROBLEM.reference)]
    LLMCritic(Scripted(*answers), check=check).critique([PROBLEM] * 3, ["a", "b", "c"])
    assert judged == [2]


def test_a_critique_with_a_wrong_answer_is_none() -> None:
    wrong = PROBLEM.reference.rsplit(" ", 1)[0] + " 1000"
    answers = [answer("D", 1, PROBLEM.reference), answer("D", 1, wrong), answer("A", 0, "x")]
    critiques = LLMCritic(Scripted(*answers), check=partial(check_all, TASK)).critique(
        [PROBLEM] * 3, ["a", "a", wrong]
    )
    assert critiques == [Critique("D", PROBLEM.reference, 1), None, None]
