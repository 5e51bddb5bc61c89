from __future__ import annotations

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from slow_workers import SLOW, answering_pool

from selfdistill.tasks.answers import (
    AnswerChecker,
    MathVerifyChecker,
    PlainChecker,
    build_checker,
    majorities,
)
from selfdistill.tasks.interface import TaskError

INSTALL = "pip install 'math-verify[antlr4_13_2]>=0.8'"


@pytest.fixture(scope="module")
def checker() -> MathVerifyChecker:
    pytest.importorskip("math_verify", reason=INSTALL)
    return MathVerifyChecker()


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("x^2+1", "1 + x^2"),
        ("3628800", "10!"),
        (r"\frac{\pi}{4}", r"$\frac{1}{4}\pi$"),
    ],
)
def test_math_verify_knows_mathematics(checker: MathVerifyChecker, gold: str, answer: str) -> None:
    assert checker.equal(gold, answer)
    assert not PlainChecker().equal(gold, answer)


def test_math_verify_tells_apart_what_differs(checker: MathVerifyChecker) -> None:
    for gold, answer in [("3", "4"), (r"\sqrt{2}", r"\sqrt{3}"), ("x+1", "x-1"), ("5", "Monday")]:
        assert not checker.equal(gold, answer)


def test_verdicts_come_in_the_order_of_the_pairs(checker: MathVerifyChecker) -> None:
    pairs = [("x+1", "1+x"), ("2", "3"), ("x+1", "1+x"), ("x+1", "x-1"), ("2", "2.0")]
    assert checker.decide(pairs) == [True, False, True, False, True]
    assert checker.decide([]) == []


def test_only_expressions_are_asked_about_and_only_once(tmp_path: Path) -> None:
    checker = MathVerifyChecker(answering_pool(tmp_path / "log"))
    pairs = [("1/2", "0.5"), ("x+1", "x + 1"), ("y", "Monday"), ("3", "(3, 4)"), ("a+b", "b+a")]
    assert checker.decide(pairs * 2) == [True, True, False, False, False] * 2
    assert checker.decide(pairs[-1:]) == [False]
    assert (tmp_path / "log").read_text() == "b+a\n"


def test_what_ran_out_of_its_own_time_stays_undecided(tmp_path: Path) -> None:
    checker = MathVerifyChecker(answering_pool(tmp_path / "log", size=1, answer_seconds=2.0))
    pair = ("x+1", SLOW)
    assert checker.decide([pair, ("x+1", "x-1")]) == [None, False]
    assert checker.decide([pair]) == [None]
    assert not checker.equal(*pair)
    assert (tmp_path / "log").read_text().count(SLOW) == 1


def test_what_no_time_was_left_for_is_tried_again(tmp_path: Path) -> None:
    checker = MathVerifyChecker(answering_pool(tmp_path / "log", size=1))
    pairs = [("x+1", SLOW), ("x+1", "x-1")]
    assert checker.decide(pairs, seconds=0.5) == [None, None]
    assert checker.decide(pairs[1:], seconds=60.0) == [False]


def test_without_math_verify_the_fallback_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "math_verify" else find(name)
    )
    imported = builtins.__import__

    def refuse(name: str, *arguments: Any) -> Any:
        assert name != "math_verify"
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.warns(UserWarning, match=r"numbers and strings only.*math-verify\[antlr4_13_2\]"):
        checker: AnswerChecker = build_checker("auto")
    assert checker.equal("1/2", "0.5")
    assert checker.decide([("1/2", "0.5"), (r"2\sqrt{2}", r"\sqrt{8}")]) == [True, False]
    with pytest.raises(TaskError, match=r"not installed: pip install 'math-verify\[antlr4_13_2\]"):
        build_checker("math-verify")


def test_majority_counts_classes_of_equal_answers() -> None:
    groups = [
        ["3", "1/2", "4", "0.5", "3"],
        ["1/2", "3", "0.5", "3", r"\frac{1}{2}"],
        ["4", "3"],  # a tie goes to the earliest
        ["", "", "5"],
        ["", ""],
        [],
    ]
    assert majorities(groups, PlainChecker()) == ["3", "1/2", "4", "5", None, None]
    assert majorities([], PlainChecker()) == []
