"""The paper's claims beside what was measured; whether one holds follows from intervals alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias

from selfdistill.analysis.localisation import Localisation
from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.tables import number, percent
from studies.arithmetic.reproduce.arms import COPYING, OTHER_PATH, REGIMES
from studies.arithmetic.reproduce.findings import Copying, Findings, Gap
from studies.arithmetic.reproduce.jobs import TokenFigures

Answer: TypeAlias = Literal["yes", "no", "not separated"]

# How much more of the advantage must lie on the wrong step than with RefSol.
TIMES = 3.0


@dataclass(frozen=True)
class Claim:
    """A claim about the advantage by token, and what was measured.

    Attributes:
        text: the claim.
        measured: the figures.
        holds: see `all_above`.
    """

    text: str
    measured: str
    holds: Answer


@dataclass(frozen=True)
class Order:
    """The paper's order StepAlignFB > RefSol > GRPO in one setting.

    Attributes:
        problems: which ones.
        regime: what is equal between the methods.
        steps: of training.
        wording: of the reference, "usual" or "rare".
        stepalign_refsol, refsol_grpo, stepalign_grpo: differences of Avg@k, paired by problem.
        above_refsol: whether StepAlignFB is above RefSol; see `all_above`.
        whole: whether the whole order holds.
        repeated: True where StepAlignFB and RefSol are the same runs as in an earlier regime, which
            compares them with another GRPO.
    """

    problems: str
    regime: str
    steps: int
    wording: Literal["usual", "rare"]
    stepalign_refsol: Interval
    refsol_grpo: Interval
    stepalign_grpo: Interval
    above_refsol: Answer
    whole: Answer
    repeated: bool


def orders(findings: Findings) -> list[Order]:
    """Return every setting in which the order can be looked for."""
    found: list[Order] = []
    if findings.main is not None:
        found += _orders(findings.main.gaps, "all")
    for stratum in findings.difficulty or ():
        base = stratum.base.metrics["avg_at_k"]
        assert base is not None
        found += _orders(stratum.gaps, f"base success {100 * base.value:.0f} %")
    return found


def _orders(gaps: Sequence[Gap], problems: str) -> list[Order]:
    found = []
    seen: set[tuple[str, str, int]] = set()
    wordings: tuple[Literal["usual", "rare"], ...] = ("usual", "rare")
    for steps, regime, wording in product(sorted({g.steps for g in gaps}), REGIMES, wordings):
        refsol = regime.refsol if wording == "usual" else regime.refsol_rare
        step_refsol = difference(gaps, refsol.label, regime.stepalign.label, steps)
        refsol_grpo = difference(gaps, regime.grpo.label, refsol.label, steps)
        step_grpo = difference(gaps, regime.grpo.label, regime.stepalign.label, steps)
        if step_refsol is None or refsol_grpo is None or step_grpo is None:
            continue  # that regime was not run on these problems
        pair = (regime.stepalign.label, refsol.label, steps)
        found.append(
            Order(
                problems=problems,
                regime=regime.name,
                steps=steps,
                wording=wording,
                stepalign_refsol=step_refsol,
                refsol_grpo=refsol_grpo,
                stepalign_grpo=step_grpo,
                above_refsol=all_above([step_refsol]),
                whole=all_above([step_refsol, refsol_grpo]),
                repeated=pair in seen,
            )
        )
        seen.add(pair)
    return found


def localisation_claims(findings: Findings) -> list[Claim]:
    """Return the paper's claims about the advantage around the first wrong step."""
    if findings.copying is None:
        return []
    tokens = findings.copying.tokens
    refsol = {label: figures for label, figures in tokens.items() if label.startswith("RefSol")}
    if findings.wording is not None:
        refsol = {
            f"RefSol in dialect {dose.dialect}, which the solver writes {100 * dose.share:.0f} % "
            "of the time": dose.tokens
            for dose in findings.wording
        } | {OTHER_PATH: tokens[OTHER_PATH]}
    partial = tokens[COPYING["partial_repetition"]].later_wrong
    return [
        *_localisation(findings.copying),
        *(_share_claim(partial, label, figures) for label, figures in refsol.items()),
    ]


def _localisation(copying: Copying) -> list[Claim]:
    """Signs around the first wrong step, where right steps come before it."""
    at = {label: figures.later_wrong for label, figures in copying.tokens.items()}
    partial, full, omission = (at[label] for label in COPYING.values())
    return [
        Claim(
            "StepAlignFB: A > 0 before the first wrong step, A < 0 within it",
            _before_and_at(partial),
            all_above([partial.mean_before, _negated(partial.mean_at)]),
        ),
        Claim(
            "full repetition: A > 0 within the wrong step (the error is reinforced)",
            _before_and_at(full),
            all_above([full.mean_at]),
        ),
        Claim(
            "omission: A < 0 before the wrong step (right steps are punished)",
            _before_and_at(omission),
            all_above([_negated(omission.mean_before)]),
        ),
    ]


def _share_claim(partial: Localisation, label: str, refsol: TokenFigures) -> Claim:
    text = f"share of |A| on the wrong step: StepAlignFB at least {TIMES:g} times {label}"
    times = refsol.share_times
    if times is None:
        return Claim(text, "no such attempts", "not separated")
    shares = f"{percent(partial.share_at)} against {percent(refsol.later_wrong.share_at)}"
    measured = f"{number(times, '.2f')} times: {shares}"
    if times.low >= TIMES:
        return Claim(text, measured, "yes")
    return Claim(text, measured, "no" if times.high < TIMES else "not separated")


def difference(gaps: Sequence[Gap], first: str, second: str, steps: int) -> Interval | None:
    """Return Avg@k of `second` minus that of `first`, or None when it was not measured."""
    wanted = (first, second, steps)
    return next((g.difference for g in gaps if (g.first, g.second, g.steps) == wanted), None)


def all_above(intervals: Sequence[Interval | None]) -> Answer:
    """Tell whether quantities are positive, from their intervals.

    Returns:
        "yes" when all intervals lie above 0, "no" when one lies below, else "not separated".
    """
    known = [interval for interval in intervals if interval is not None]
    if any(interval.high < 0 for interval in known):
        return "no"
    if len(known) == len(intervals) and all(interval.low > 0 for interval in known):
        return "yes"
    return "not separated"


def _negated(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    return Interval(-interval.value, -interval.high, -interval.low)


def _before_and_at(figures: Localisation) -> str:
    return (
        f"before {number(figures.mean_before, '+.2f')}, within {number(figures.mean_at, '+.2f')} "
        "nats a token"
    )
