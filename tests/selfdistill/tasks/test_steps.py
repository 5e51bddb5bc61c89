from __future__ import annotations

import pytest

from selfdistill.config.tasks import STEP_INSTRUCTION
from selfdistill.tasks.steps import StepSpan, follows_format, split_steps

RESPONSE = "<step_1> 2 + 3 = 5 <step_2> 5 + 1 = 6 <answer> 6"


def test_a_step_ends_where_the_next_begins() -> None:
    steps = split_steps(RESPONSE)
    assert [step.number for step in steps] == [1, 2, None]
    pieces = [RESPONSE[step.start : step.stop] for step in steps]
    assert pieces == ["<step_1> 2 + 3 = 5 ", "<step_2> 5 + 1 = 6 ", "<answer> 6"]
    assert split_steps("no tag at all") == []
    closed = "Well. <step_1>a</step_1>\n<answer>1</answer>"
    assert split_steps(closed) == [StepSpan(1, 6, 25), StepSpan(None, 25, len(closed))]


@pytest.mark.parametrize(
    ("response", "follows"),
    [
        (RESPONSE, True),
        ("<step_1>a</step_1><answer>1</answer>", True),
        ("<Step_1> a <ANSWER> 1", True),
        ("<step_2> a <answer> 1", False),
        ("<step_1> a <step_1> b <answer> 1", False),
        ("<step_1> a <answer> 1 <step_2> b", False),
        ("Sure! <step_1> a <answer> 1", False),
        ("<answer> 1", False),
        ("", False),
    ],
)
def test_the_format_asks_for_steps_in_order_and_one_answer(response: str, follows: bool) -> None:
    assert follows_format(response) == follows


def test_the_instruction_names_every_tag() -> None:
    assert [step.number for step in split_steps(STEP_INSTRUCTION)] == [1, 2, None]
