"""Steps that taught nothing: said at once, and too many of them end the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from selfdistill.config import Config
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
    """Say what became of the rollouts of empty steps."""
    rollouts = len(empty) * config.prompts_per_step * config.method.group_size
    without, too_long = (sum(record[name] for record in empty) for name in ("dropped", "too_long"))
    rest = rollouts - without - too_long
    parts = []
    if without:
        counts: Counter[str] = Counter()
        for record in empty:
            counts.update(record.get("unusable", {}))
        reasons = "; ".join(f"{count}: {reason}" for reason, count in counts.most_common())
        parts.append(
            f"{without} had nothing to show to the teacher{f' ({reasons})' if reasons else ''}"
        )
    if too_long:
        parts.append(f"{too_long} did not fit")
    if rest:
        parts.append(f"{rest} gave no signal ({_why_no_signal(config)})")
    return f"of {rollouts} rollouts {', '.join(parts)}"


def advice(config: Config, empty: Records) -> str:
    """Say what to look at, after what became of most rollouts."""
    method = config.method
    without, too_long = (sum(record[name] for record in empty) for name in ("dropped", "too_long"))
    rollouts = len(empty) * config.prompts_per_step * method.group_size
    if too_long > rollouts / 2:
        return "Raise prompt.max_length, or choose shorter problems"
    if without > rollouts / 2:
        if method.name == "stepalign":
            return "Look at what the critic answers, or set method.critic.fallback: reference"
        if method.name == "contrast":
            return "Look at what the critic answers, and which attempts have no other critique"
        return "Choose easier problems: the teacher sees what other rollouts or the checker give"
    if method.name == "grpo":
        return "Choose problems that are sometimes solved, or raise prompts_per_step or group_size"
    if method.name == "wrong_step":
        return "Choose harder problems, or look at what the critic answers"
    return "Lower method.loss.advantage_mask.threshold"


def _why_no_signal(config: Config) -> str:
    if config.method.name == "grpo":
        return "all rewards of a prompt are equal"
    if config.method.name == "wrong_step":
        return "the critic found no wrong step"
    if config.method.name == "contrast":
        return "the two critiques of each attempt say the same"
    return "the advantage mask keeps none"
