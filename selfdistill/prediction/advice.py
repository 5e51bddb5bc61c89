"""Which method and which mask to begin with: the forecasts where there are some, else the gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from selfdistill.evaluation.intervals import Interval
from selfdistill.prediction.probe import ContextProbe, Probe

# With fewer groups of right and wrong rollouts a step, most steps of GRPO teach nothing.
FEWEST_GROUPS = 0.5
# From so many on it has enough to be tried beside a teacher; the study's 8 x 8 had seven.
ENOUGH_GROUPS = 4.0
# A mask pays where the disagreement is about errors: the teacher's |A| on wrong attempts is at
# least so many times that on right ones.
ABOUT_ERRORS = 2.0
# What saves less than this share of the tokens is not worth a setting.
FEWER_TOKENS = 0.5


class Forecasted(Protocol):
    """What advice needs of a forecast (`selfdistill.prediction.forecast.Forecast`)."""

    @property
    def label(self) -> str: ...
    @property
    def gain(self) -> Interval | None: ...
    @property
    def mixed_groups(self) -> float | None: ...


@dataclass(frozen=True)
class Advice:
    """What to begin with.

    Attributes:
        method: label of a method, or None where nothing is likely to help.
        mask: a setting of `method.loss.advantage_mask`, or None for all tokens.
        reasons: sentences, in the order of their weight.
    """

    method: str | None
    mask: str | None
    reasons: tuple[str, ...]


def advise(probe: Probe, forecasts: Sequence[Forecasted]) -> Advice:
    """Choose among the methods that were tried and GRPO, at the rollouts of the configuration.

    Args:
        probe: what was measured.
        forecasts: of the same methods, in the same order, then GRPO's if it can be had.
    """
    teachers = {context.label: context for context in probe.contexts}
    grpo = next((f for f in forecasts if f.mixed_groups is not None), None)
    reasons = []
    useful = []
    for label, context in teachers.items():
        before = context.localisation.mean_before
        if context.gap.low <= 0:
            reasons.append(
                f"The teacher of {label} is not clearly better than the student "
                f"({_points(context.gap)} points), so there is little to learn from it."
            )
        elif context.disputes_right_steps and before is not None:
            reasons.append(
                f"The teacher of {label} disputes steps that are right ({before.value:+.2f} nats a "
                "token before the first wrong one): in the miniature such teachers taught nothing."
            )
        else:
            useful.append(label)
    groups = 0.0 if grpo is None or grpo.mixed_groups is None else grpo.mixed_groups
    if grpo is not None and groups < FEWEST_GROUPS:
        reasons.append(
            f"GRPO would have {groups:.1f} groups a step with right and wrong rollouts: most steps "
            "would teach it nothing."
        )
    candidates = [f for f in forecasts if f.label in useful or (f is grpo and groups > 0)]
    known = {f.label: f.gain for f in candidates if f.gain is not None}
    method = None
    if candidates and len(known) == len(candidates):
        method, gain = max(known.items(), key=lambda item: item[1].value)
        if gain.low <= 0:
            reasons.insert(0, "No forecast is clearly above 0 at this budget.")
            method = None
        else:
            reasons.insert(0, f"{method} has the highest forecast: {_points(gain)} points.")
            near = [n for n, g in known.items() if n != method and g.high >= gain.low]
            if near:
                reasons.insert(1, f"Its interval overlaps that of {', '.join(near)}.")
    elif candidates:
        method, reason = _by_the_gap(teachers, useful, groups)
        reasons.insert(0, reason)
    if method is None:
        reasons.append(
            "Neither a teacher nor rewards help much here: take easier problems, another context, "
            "more rollouts, or train on solutions first."
        )
    mask = None
    if method in teachers:
        mask, reason = _mask(teachers[method])
        reasons.append(reason)
    return Advice(method, mask, tuple(reasons))


def _by_the_gap(
    teachers: dict[str, ContextProbe], useful: Sequence[str], groups: float
) -> tuple[str | None, str]:
    """Choose where no law knows how many steps it takes."""
    if not useful:
        if groups < FEWEST_GROUPS:
            return None, "No teacher is clearly better than the student."
        return "grpo", "No teacher is clearly better than the student, and rewards are mixed."
    best = max(useful, key=lambda label: teachers[label].gap.value)
    gap = _points(teachers[best].gap)
    if groups >= ENOUGH_GROUPS:
        return best, (
            f"{best} has the widest gap, {gap} points, which is about all that it can bring. GRPO "
            f"has {groups:.1f} mixed groups a step and no such ceiling: try it, too, for long runs."
        )
    return best, (
        f"{best} has the widest gap, {gap} points, and there are few groups for GRPO: "
        f"{groups:.1f} a step are mixed."
    )


def _mask(context: ContextProbe) -> tuple[str | None, str]:
    right, wrong, mask = context.right.magnitude, context.wrong.magnitude, context.mask
    if right and wrong and wrong.value < ABOUT_ERRORS * right.value:
        return None, (
            f"No mask: the teacher disputes right attempts ({right.value:.3f} nats a token) nearly "
            f"as much as wrong ones ({wrong.value:.3f}), so a mask would keep wording, not errors."
        )
    if mask is None or mask.rho.value > FEWER_TOKENS:
        return None, "No mask: none keeps 90 % of the disagreement on less than half of the tokens."
    setting = f"{{threshold: {mask.threshold:g}, sign: {mask.sign}}}"
    return setting, (
        f"advantage_mask: {setting} keeps 90 % of the disagreement on {mask.rho.value:.0%} of the "
        "tokens. That saves time; that it learns as much was not tested here."
    )


def _points(interval: Interval) -> str:
    value, low, high = (f"{100 * x:+.1f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"
