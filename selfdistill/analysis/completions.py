"""`selfdistill show`: what was written at a step, coloured by what the teacher thought of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from selfdistill.errors import UserError
from selfdistill.runlog import JsonLines
from selfdistill.training.completions import FOLDER, saved
from selfdistill.visible import visible

# Beyond it, in nats, a token is shown in bold.
_STRONG = 1.0


class NoCompletionsError(UserError):
    """A run without completions, or a step that has none."""


def read_step(run: Path, step: int | None) -> list[dict[str, Any]]:
    """Return the records of a step, by default of the last one.

    Raises:
        NoCompletionsError: there are none.
        LogError: the file is no log.
    """
    files = saved(run / FOLDER)
    if not files:
        raise NoCompletionsError(
            f"{run} keeps no completions: train it without `completions: null` in its configuration"
        )
    step = max(files) if step is None else step
    if step not in files:
        raise NoCompletionsError(
            f"{run} has no completions of step {step}, but of {len(files)} steps from {min(files)} "
            f"to {max(files)}"
        )
    return JsonLines(files[step]).read()


def show(records: Sequence[Mapping[str, Any]], *, most: int) -> list[Text]:
    """Return what to print of the first `most` rollouts.

    Tokens that the teacher prefers are green, those that it rejects red, bold beyond 1 nat; the
    most disputed one of a rollout is named as well, for places without colours.
    """
    shown: list[Text] = []
    question = None
    for record in records[:most]:
        if record["question"] != question:
            question = record["question"]
            shown.append(Text(f"\nstep {record['step']}, problem {record['problem']}", "bold"))
            shown.append(Text(visible(question)))
        verdict = "right" if record["correct"] else "wrong"
        head = f"\nrollout {record['rollout']}: reward {record['reward']:g}, {verdict}"
        if not record["finished"]:
            head += ", cut off"
        shown.append(Text(head, "bold"))
        shown.append(_tokens(record["tokens"], record["advantages"]))
        if record["advantages"]:
            place = max(
                range(len(record["advantages"])), key=lambda i: abs(record["advantages"][i])
            )
            shown.append(
                Text(
                    f"largest advantage {record['advantages'][place]:+.3f} nats, at token {place} "
                    f"{visible(record['tokens'][place])!r}",
                    "dim",
                )
            )
        if record["context"] is not None:
            shown.append(Text(f"the teacher's {record['context']['kind']}:", "dim"))
            shown.append(Text(visible(record["context"]["text"]), "dim"))
    return shown


def _tokens(tokens: Sequence[str], advantages: Sequence[float] | None) -> Text:
    text = Text()
    for i, token in enumerate(tokens):
        # Behind the first wrong step nothing may have been scored.
        advantage = advantages[i] if advantages is not None and i < len(advantages) else 0.0
        style = "green" if advantage > 0 else "red" if advantage < 0 else ""
        text.append(visible(token), f"bold {style}" if abs(advantage) > _STRONG else style)
    return text
