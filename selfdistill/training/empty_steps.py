"""Steps that taught nothing: said at once, and too many of them end the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from selfdistill.config import Config, ContrastMethod, GRPOMethod, WrongStepMethod
from selfdistill.errors import UserError

# Lines of metrics.jsonl.
Records = Sequence[Mapping[str, Any]]


class NothingLearnedError(UserError):
    """No reward and no teacher told many steps in a row anything; the message has the counts."""


def trailing(records: Records) -> list[Mapping[str, Any]]:
    """Return the empty steps that a log ends with."""
    found: list[Mapping[str, Any]] = []
    for record in reversed(records):
        if record.get("taught", record["active"] > 0):  # older logs say less
            break
        found.insert(0, record)
    return found


def nothing_learned(config: Config, empty: Records, *, step: int) -> NothingLearnedError | None:
    """Return the error that ends a run which learns nothing.

    Args:
        config: says how many empty steps in a row are too many.
        empty: the last steps, all of them empty.
        step: the step just taken.

    Returns:
        None while there are fewer, unless the run is over and none of its steps taught anything.
    """
    limit = config.max_empty_steps
    if limit is None or not empty:
        return None
    if len(empty) < limit and not len(empty) == step == config.steps:
        return None
    return NothingLearnedError(
        f"the last {len(empty)} of {step} steps taught nothing: {describe(config, empty)}. "
        f"{advice(config, empty)}, then go on with --resume or start anew; max_empty_steps says "
        "how many such steps in a row end a run"
    )


def describe(config: Config, empty: Records) -> str:
    """Say what became of the rollouts of empty steps, and of a critic's answers."""
    rollouts, without, too_long = _counts(config, empty)
    rest = rollouts - without - too_long
    unusable = _unusable(empty)
    reasons = "; ".join(f"{count}: {reason}" for reason, count in unusable.most_common())
    parts = []
    if without:
        parts.append(
            f"{without} had nothing to show to the teacher{f' ({reasons})' if reasons else ''}"
        )
    if too_long:
        parts.append(f"{too_long} did not fit")
    if rest:
        parts.append(f"{rest} gave no signal ({_why_no_signal(config)})")
    text = f"of {rollouts} rollouts {', '.join(parts)}"
    if reasons and not without:
        text += f"; {unusable.total()} of the critic's answers were no critique ({reasons})"
    return text


def advice(config: Config, empty: Records) -> str:
    """Say what to look at, after what became of most rollouts."""
    method = config.method
    rollouts, without, too_long = _counts(config, empty)
    if too_long > rollouts / 2:
        return "Raise prompt.max_length, or choose shorter problems"
    if without > rollouts / 2 or _unusable(empty).total() > rollouts / 2:
        if method.name == "stepalign":
            return "Look at what the critic answers, or set method.critic.fallback: reference"
        if method.name == "contrast":
            return "Look at what the critic answers, and which attempts have no other critique"
        if method.name == "wrong_step":
            return "Look at what the critic answers"
        return "Choose easier problems: the teacher sees what other rollouts or the checker give"
    match method:
        case GRPOMethod():
            return (
                "Choose problems that are sometimes solved, or raise prompts_per_step or group_size"
            )
        case WrongStepMethod():
            return "Choose harder problems, or look at what the critic answers"
        case ContrastMethod():
            return "Look at what the critic answers"
    if method.reward is not None:
        return (
            "Choose problems that are sometimes solved, raise method.group_size, or look at what "
            "the teacher sees"
        )
    if method.loss.token_selection is not None:
        return "Raise method.loss.token_selection.share"
    if method.loss.advantage_mask is not None:
        return "Lower method.loss.advantage_mask.threshold"
    return "Look at what the student writes (selfdistill show)"


def _counts(config: Config, empty: Records) -> tuple[int, int, int]:
    """Return the rollouts, those that the teacher sees nothing for, and those that do not fit."""
    rollouts = len(empty) * config.prompts_per_step * config.method.group_size
    without, too_long = (sum(record[name] for record in empty) for name in ("dropped", "too_long"))
    return rollouts, without, too_long


def _unusable(empty: Records) -> Counter[str]:
    """Return how many answers of the critic were no critique, by reason."""
    counts: Counter[str] = Counter()
    for record in empty:
        counts.update(record.get("unusable", {}))  # older logs say less
    return counts


def _why_no_signal(config: Config) -> str:
    match config.method:
        case GRPOMethod():
            return "all rewards of a prompt are equal"
        case WrongStepMethod():
            return "no critique names a wrong step"
        case ContrastMethod():
            return "the two critiques of each attempt say the same"
    loss = config.method.loss
    if loss.token_selection is not None:
        compared = "the token selection keeps none"
    elif loss.advantage_mask is not None:
        compared = "the advantage mask keeps none"
    else:
        compared = "no token was compared with the teacher"
    if config.method.reward is None:
        return compared
    return f"all rewards of a prompt are equal, and {compared}"
