"""The questions of the study; every answer follows from intervals alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from selfdistill.evaluation.intervals import Interval
from studies.arithmetic.mechanisms import arms
from studies.arithmetic.mechanisms.arms import Arm
from studies.arithmetic.mechanisms.findings import Findings

Verdict: TypeAlias = Literal["better", "worse", "not separated"]

# What the study hunts for: Avg@k of a single arm at 8 rollouts a step.
TARGET = 0.95


@dataclass(frozen=True)
class Question:
    """What the field argues about, and the arms that speak to it.

    Attributes:
        text: one line.
        source: who claims what.
        arms: that are compared.
        against: what with.
        advice: what to do, where an arm is better, worse, or neither.
    """

    text: str
    source: str
    arms: tuple[Arm, ...]
    against: Arm
    advice: Mapping[Verdict, str]


QUESTIONS = (
    Question(
        "Does a teacher that is made anew break the fixed teacher's ceiling?",
        "arXiv 2606.11173 keeps the base model",
        (arms.REFRESHED, arms.EMA, arms.LIVE),
        arms.STEPALIGN,
        {
            "better": "use it once dev accuracy stops rising",
            "worse": "keep the fixed teacher",
            "not separated": "the fixed teacher is simpler",
        },
    ),
    Question(
        "Does a sharper teacher break the ceiling?",
        "votes of 12 are nearly always right, so the errors left are draws at temperature 1",
        (arms.SHARPER,),
        arms.STEPALIGN,
        {
            "better": "set teacher_temperature below 1",
            "worse": "leave the teacher's temperature at 1",
            "not separated": "leave the teacher's temperature at 1",
        },
    ),
    Question(
        "And does it when rollouts are cut behind the first wrong step?",
        "both under a cosine schedule",
        (arms.SHARPER_STOP,),
        arms.STEPALIGN_COSINE,
        {
            "better": "do both where steps are known",
            "worse": "follow the teacher to the end",
            "not separated": "follow the teacher to the end",
        },
    ),
    Question(
        "Does the student gain by going back to its best, which then teaches?",
        "both under a cosine schedule",
        (
            arms.RETURNING,
            arms.RETURNING_STOP,
            arms.RETURNING_THRICE,
            arms.RESTARTED,
        ),
        arms.STEPALIGN_COSINE,
        {
            "better": "use it once dev accuracy stops rising",
            "worse": "keep the fixed teacher",
            "not separated": "the fixed teacher is simpler",
        },
    ),
    Question(
        "Should the learning rate fall?",
        "a cosine schedule",
        (arms.STEPALIGN_COSINE,),
        arms.STEPALIGN,
        {
            "better": "let it fall",
            "worse": "keep it constant",
            "not separated": "a constant rate lets a run be lengthened",
        },
    ),
    Question(
        "Do rewards add something to the critique?",
        "two signals from the same rollouts",
        (arms.WITH_GRPO, arms.THEN_GRPO),
        arms.STEPALIGN,
        {
            "better": "go on with rewards where answers can be checked",
            "worse": "leave rewards out at so few rollouts",
            "not separated": "leave rewards out: they bring nothing at so few rollouts",
        },
    ),
    Question(
        "Should a useless critique's signal be subtracted?",
        "RLCSD, arXiv 2606.11709, and CREDIT, arXiv 2605.11613",
        (*arms.CONTRASTS, arms.THEN_CONTRAST),
        arms.STEPALIGN,
        {
            "better": "subtract it",
            "worse": "follow the right critique alone",
            "not separated": "follow the right critique alone, which needs one teacher pass",
        },
    ),
    Question(
        "Should early tokens count more?",
        "arXiv 2605.21606: position predicts how far the teacher can be relied on",
        (arms.EARLY,),
        arms.STEPALIGN,
        {
            "better": "weigh tokens by their place",
            "worse": "weigh all tokens alike",
            "not separated": "weigh all tokens alike",
        },
    ),
    Question(
        "Is it enough to know which step is wrong?",
        "arXiv 2608.31046: one constant negative advantage",
        (arms.WRONG_STEP,),
        arms.STEPALIGN,
        {
            "better": "no teacher is needed: penalise the wrong step",
            "worse": "let the teacher say what is right",
            "not separated": "no teacher is needed: penalise the wrong step",
        },
    ),
    Question(
        "Are a few tokens enough?",
        "TIP, arXiv 2604.14084",
        (arms.ENTROPY, arms.CONFIDENT, arms.TOP, arms.ABOVE, arms.STOP),
        arms.STEPALIGN,
        {
            "better": "use the mask, which saves time as well",
            "worse": "compare all tokens",
            "not separated": "use the mask where the loss takes a share of the time that counts",
        },
    ),
    Question(
        "Does clipping help?",
        "OPSD clips entries at 0.05",
        (arms.ENTRY_CLIP, arms.TOKEN_CLIP),
        arms.STEPALIGN,
        {
            "better": "clip",
            "worse": "do not clip",
            "not separated": "no reason to clip",
        },
    ),
    Question(
        "May the reference take another path?",
        "the paper's references are others' solutions",
        (arms.OTHER_PATH,),
        arms.REFSOL,
        {
            "better": "any path will do",
            "worse": "show references that follow the solver's own path, or a critique",
            "not separated": "any path will do",
        },
    ),
    Question(
        "How right must the critic be?",
        "critics err",
        tuple(arms.CRITICS.values()),
        arms.STEPALIGN,
        {
            "better": "errors do no harm",
            "worse": "check the critic's answers, drop the wrong ones",
            "not separated": "errors at this rate do no harm that shows",
        },
    ),
)


@dataclass(frozen=True)
class Answer:
    """An arm beside what it is compared with."""

    question: Question
    arm: Arm
    difference: Interval
    verdict: Verdict


def verdict(difference: Interval) -> Verdict:
    """Return on which side of 0 a difference lies with its whole interval."""
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "not separated"


def answers(findings: Findings) -> list[Answer]:
    """Return what the finished arms say."""
    return [
        Answer(question, arm, difference, verdict(difference))
        for question in QUESTIONS
        for arm in question.arms
        if arm.key in findings.rows
        and (difference := findings.rows[arm.key].differences.get(question.against.key)) is not None
    ]


def reached(findings: Findings) -> list[str]:
    """Return the arms at 8 rollouts a step that reach the target and beat StepAlignFB."""
    return [
        row.label
        for row in findings.rows.values()
        if row.key != arms.GRPO_MANY.key
        and row.avg.value >= TARGET
        and (difference := row.differences.get(arms.STEPALIGN.key)) is not None
        and verdict(difference) == "better"
    ]
