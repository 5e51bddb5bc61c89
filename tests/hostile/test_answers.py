"""Answers that are made, or happen, to break the reading, the comparing, or the clock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from slow_workers import SLOW, answering_pool

from selfdistill.evaluation.scores import majorities_are_correct, summarize
from selfdistill.rollout.attempts import judge
from selfdistill.rollout.engine import Rollout
from selfdistill.tasks.answers import AnswerChecker, MathVerifyChecker, PlainChecker
from selfdistill.tasks.dataset import DatasetTask
from selfdistill.tasks.final_answer import read_answer
from selfdistill.tasks.interface import Problem, Verdict

MALFORMED = [
    "",
    " \n\n",
    "$",
    "$$$",
    "\\",
    "\\frac{1}{",
    "\\frac{}{}",
    "\\boxed{",
    "\\begin{pmatrix}1",
    "\\text{",
    "}{" * 200,
    "{" * 300,
    "\\left(" * 100,
    "|" * 50,
    "-" * 300 + "1",
    "**" * 300,
    "\x00",
    "18\x00",
    "\ud800",
    "\u202e81",
    "\U0001f600",
    "1" * 10_000,
    "1." * 300,
    "x=",
    "=x",
    "<",
    "(",
    ")",
    "[1,2",
    "_",
    "^2",
    "%",
    "e1",
    "1e",
    "0/0",
    "\\frac{0}{0}",
    "NaN",
    "Infinity",
    "None",
    "lambda: __import__('os')",
    "</answer>",
    "<answer>",
    "####",
]


@pytest.fixture(scope="module")
def math_verify() -> MathVerifyChecker:
    pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]>=0.8'")
    return MathVerifyChecker()


def test_no_text_makes_a_checker_raise_or_is_right(math_verify: MathVerifyChecker) -> None:
    golds = ["7", r"\sqrt{2}", "x > 3", "(1, 2)", "Monday", "18 km"]
    pairs = [(gold, text) for gold in golds for text in MALFORMED]
    checkers: list[AnswerChecker] = [math_verify, PlainChecker()]
    for checker in checkers:
        assert not any(checker.decide(pairs))
        checker.decide([(text, gold) for gold, text in pairs])
    assert math_verify.equal(r"\sqrt{4}", "2")  # and it still works afterwards


def test_no_text_makes_the_reading_raise() -> None:
    for text in MALFORMED:
        for response in (text, text * 50, f"<answer>{text}", rf"\boxed{{{text}", f"#### {text}"):
            answer = read_answer(response)
            assert answer is None or (answer and "\n" not in answer)


def test_reading_and_comparing_pass_over_a_response_a_few_times_only() -> None:
    # With a pass for each of its boxes, tags or spaces, each of these would take minutes.
    pieces = [
        r"\boxed{",
        r"\boxed{1",
        "{",
        "}",
        "<answer>",
        "#### 1\n",
        "The answer is ",
        "The answers would then ",
        " ",
        "$",
        "**1",
        "`",
        r"\[",
        "(",
        "1,",
        "1 ",
        "x=",
        r"\pm",
        "a and ",
    ]
    for piece in pieces:
        read_answer(piece * 20_000)
        for length in (900, 100_000):
            PlainChecker().equal("18", piece * (length // len(piece)))


@pytest.mark.parametrize(
    "answer",
    [
        "x+" * 600 + "1",
        "(" * 21 + "x" + ")" * 21,
        r"\sqrt{" * 21 + "x" + "}" * 21,
        "2^{12345}",
        "x^2^2^2",
        "12345!",
    ],
)
def test_what_would_take_long_is_undecided_at_once(tmp_path: Path, answer: str) -> None:
    checker = MathVerifyChecker(answering_pool(tmp_path / "log"))
    assert checker.decide([("7", answer), (answer, answer)]) == [None, True]
    assert not (tmp_path / "log").exists()  # nobody was asked


PROBLEM = Problem("p", "q", "x+1", "")


def attempt(answer: str) -> Rollout:
    return Rollout([1], [0.0], f"<step_1> a <answer> {answer}", True)


def slow_task(folder: Path, *, seconds: float, size: int = 2) -> DatasetTask:
    checker = MathVerifyChecker(answering_pool(folder / "log", size=size))
    return DatasetTask(
        "jsonl", {"dev": [PROBLEM]}, instruction="", checker=checker, checker_seconds=seconds
    )


def test_a_step_of_slow_answers_ends_at_its_limit_and_they_are_counted(tmp_path: Path) -> None:
    task = slow_task(tmp_path, seconds=2.0, size=1)
    group = [attempt(answer) for answer in ("x+1", "x-1", "7", SLOW, SLOW)]
    groups = [group, [attempt(SLOW)] * 5]
    attempts = judge(task, [PROBLEM, Problem("r", "s", "y+1", "")], groups)
    right, *_ = attempts[0].verdicts
    assert (right.correct, right.undecided) == (True, False)
    assert [v.undecided for v in attempts[0].verdicts] == [False, False, False, True, True]
    assert all(v.undecided and not v.correct and v.complete for v in attempts[1].verdicts)
    evaluation = summarize(attempts, task, split="dev")
    assert evaluation.undecided == 7
    assert evaluation.avg_at_k.value == pytest.approx(0.1)


def test_an_undecided_answer_has_no_vote_and_is_not_compared_again(tmp_path: Path) -> None:
    task = slow_task(tmp_path, seconds=1.0)
    (judged,) = judge(task, [PROBLEM], [[attempt(SLOW), attempt(SLOW), attempt("x+1")]])
    assert majorities_are_correct(task, [judged.verdicts]) == [True]
    asked = (tmp_path / "log").read_text().split()
    assert asked == [SLOW]


def test_votes_among_slow_answers_end_at_one_limit(tmp_path: Path) -> None:
    """Each problem had a limit of its own: an evaluation of many took as many times as long."""
    task = slow_task(tmp_path, seconds=1.0, size=1)
    groups = [["x+1", SLOW, "x-1", "x + 1"], ["y+1", "y-1", "y + 1", SLOW], ["z", SLOW, "z"]]
    assert task.majorities(groups) == ["x+1", "y+1", "z"]
    assert (tmp_path / "log").read_text().split() == [SLOW]  # no other had its turn


def test_one_answer_is_judged_like_many(tmp_path: Path) -> None:
    task = slow_task(tmp_path, seconds=1.0)
    verdict = task.check(PROBLEM, attempt(SLOW).text)
    assert verdict == Verdict(SLOW, False, False, None, None, complete=True, undecided=True)


SMUGGLED: list[Callable[[str], str]] = [
    lambda right: f"{right} or 19",
    lambda right: f"{right}, 19",
    lambda right: f"{right} 19",
    lambda right: f"19 = {right}",
    lambda right: f"x = {right} = 19",
    lambda right: f"{right} or anything",
    lambda right: f"{{{right}, 19}}",
    lambda right: rf"\pm {right}",
    lambda right: f"{right} + x",
    lambda right: f"{right} to 19",
    lambda right: rf"\boxed{{{right}}} or \boxed{{19}}",
    lambda right: f"at least {right}",
    lambda right: f"not {right}",
    lambda right: f"{right} | 19",
]


@pytest.mark.parametrize("smuggle", SMUGGLED)
def test_a_right_answer_among_others_is_wrong(
    math_verify: MathVerifyChecker, smuggle: Callable[[str], str]
) -> None:
    for right in ("18", r"2\sqrt{2}", "x+1", "$18"):
        assert not math_verify.equal(right, smuggle(right))
