"""Comparing final answers as a person would."""

from selfdistill.tasks.answers.checkers import (
    AnswerChecker,
    CheckerName,
    MathVerifyChecker,
    PlainChecker,
    build_checker,
    majorities,
)

__all__ = [
    "AnswerChecker",
    "CheckerName",
    "MathVerifyChecker",
    "PlainChecker",
    "build_checker",
    "majorities",
]
