from __future__ import annotations

import builtins
import importlib.util
import threading
import time
from typing import Any

import pytest

from selfdistill.tasks import TaskError
from selfdistill.tasks.answers import (
    MathVerifyChecker,
    PlainChecker,
    build_checker,
    majority,
    normalize,
    read_number,
)

MALFORMED = [
    "",
    "$",
    "\\",
    "\\frac{1}{",
    "}{" * 200,
    "\\boxed{",
    "{" * 5000,
    "\x00",
    "1" * 10_000,
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "lambda: __import__('os')",
    "\n\n",
]


@pytest.fixture(scope="module")
def checker() -> MathVerifyChecker:
    pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]>=0.8'")
    return MathVerifyChecker()


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", " 42. "),
        ("42", "$42$"),
        ("42", r"\boxed{42}"),
        ("42", "042"),
        ("1234", "1,234"),
        ("0.5", "1/2"),
        ("0.5", r"\dfrac{1}{2}"),
        ("-0.5", r"-\frac{1}{2}"),
        ("-0.5", r"\frac{-1}{2}"),
        ("Monday", "monday"),
        ("(1,2)", r"\left(1,\,2\right)"),
        ("x + 1", "x+1"),
    ],
)
def test_plain_equality_of_numbers_and_strings(gold: str, answer: str) -> None:
    assert PlainChecker().equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "43"),
        ("42", "4 3"),
        ("a", "A"),  # variables
        ("1/0", "0"),
        ("1,23", "123"),
        ("", ""),
        ("2", r"\boxed{1}+\boxed{2}"),
        ("5", "5 or 6"),
    ],
)
def test_what_is_not_plainly_equal(gold: str, answer: str) -> None:
    assert not PlainChecker().equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("x^2+1", "1 + x^2"),
        (r"\{1,2\}", "{2,1}"),
        ("3628800", "10!"),
        (r"\frac{\pi}{4}", r"$\frac{1}{4}\pi$"),
        ("10", "$x = 10$"),
        ("10", r"10\text{ cm}"),
    ],
)
def test_math_verify_knows_mathematics(checker: MathVerifyChecker, gold: str, answer: str) -> None:
    assert checker.equal(gold, answer)
    assert not PlainChecker().equal(gold, answer)


def test_math_verify_tells_apart_what_differs(checker: MathVerifyChecker) -> None:
    for gold, answer in [("3", "4"), (r"\sqrt{2}", r"\sqrt{3}"), ("x+1", "x-1"), ("5", "Monday")]:
        assert not checker.equal(gold, answer)


def test_no_text_makes_a_checker_raise(checker: MathVerifyChecker) -> None:
    for text in MALFORMED:
        for gold in ("7", r"\sqrt{2}"):
            assert not checker.equal(gold, text)
            assert not PlainChecker().equal(gold, text)
        normalize(text)
        read_number(text)
    assert checker.equal(r"\sqrt{4}", "2")  # and it still works afterwards


def test_any_thread_may_ask(checker: MathVerifyChecker) -> None:
    # math-verify itself needs the main thread for its time limits.
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda k=k: found.append(checker.equal(f"{k}x", f"x*{k}")))
        for k in range(2, 6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


def test_a_comparison_that_never_ends_is_killed() -> None:
    pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]>=0.8'")
    checker = MathVerifyChecker()
    assert checker.equal(r"\sqrt{4}", "2")  # the worker is up
    checker._answer_seconds = 1.0
    start = time.monotonic()
    assert not checker.equal("9", "9^{9^{9^9}}")
    assert time.monotonic() - start < 4
    assert checker.undecided == 1
    checker._answer_seconds = 60.0
    assert checker.equal(r"\sqrt{8}", r"2\sqrt{2}")  # by a new worker


def test_a_worker_that_dies_is_replaced(checker: MathVerifyChecker) -> None:
    assert checker.equal("3y", "y*3")
    assert checker._worker is not None
    checker._worker.kill()
    checker._worker.wait()
    checker.equal("5y", "y*5")
    assert checker.equal("7y", "y*7")


def test_a_worker_that_cannot_start_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(TaskError, match="worker did not start"):
        MathVerifyChecker().equal("x", "y+1")


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
    with pytest.warns(
        UserWarning, match=r"numbers and strings only.*math-verify\[antlr4_13_2\]>=0.8"
    ):
        checker = build_checker("auto")
    assert checker.equal("1/2", "0.5")
    with pytest.raises(
        TaskError, match=r"not installed: pip install 'math-verify\[antlr4_13_2\]>=0.8'"
    ):
        build_checker("math-verify")


def test_majority_counts_classes_of_equal_answers() -> None:
    equal = PlainChecker().equal
    assert majority(["3", "1/2", "4", "0.5", "3"], equal) == "3"
    assert majority(["1/2", "3", "0.5", "3", r"\frac{1}{2}"], equal) == "1/2"
    assert majority(["4", "3"], equal) == "4"  # a tie goes to the earliest
    assert majority(["", ""], equal) is None
    assert majority([], equal) is None
