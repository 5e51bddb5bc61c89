"""Attempts as heat maps: one line a step, one coloured cell a token, the critique beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import accumulate, pairwise, zip_longest
from typing import TypeAlias, TypeVar

from selfdistill.analysis.report.text import isolated, plain
from selfdistill.analysis.tokens import TokenAnalysis

# Nats of advantage from which on a cell has its full colour, and shows its number.
FULL_COLOUR = 2.0
NUMBERED = 0.5
_TAG = re.compile(r"<(?:step_\d+|answer)>")

LEGEND = f"""<div class="legend">
<span>teacher <b>disagrees</b></span>
<span class="scale"><i></i><small>&minus;{FULL_COLOUR:g} nats</small>
<small>&minus;{FULL_COLOUR / 2:g}</small><small>0</small><small>+{FULL_COLOUR / 2:g}</small>
<small>+{FULL_COLOUR:g} nats</small></span>
<span>teacher <b>agrees more</b></span></div>"""


T = TypeVar("T")
Row: TypeAlias = tuple[range | None, str, str]
"""One step: the attempt's tokens and text, and the critique's text; None and "" where absent."""


def clear_examples(attempts: Sequence[TokenAnalysis]) -> list[TokenAnalysis]:
    """Return the attempts whose first error follows a right step, sharpest disagreement first.

    They show best what a critique keeps and what it changes; steps that were left out do not.
    """
    return sorted(filter(_follows_a_right_step, attempts), key=_lowest_advantage)


def spread(items: Sequence[T], *, count: int) -> list[T]:
    """Return `count` items at even distances, the first and the last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def verdict(record: TokenAnalysis) -> str:
    """Say in words what went wrong in an attempt and what the teacher thinks of it."""
    rows = align(record)
    wrong = _wrong_row(record, rows)
    if wrong is None:
        return ""
    tokens, attempt, critique = rows[wrong]
    assert tokens is not None  # the wrong row holds the wrong tokens
    said = f'wrote <q class="bad">{_body(attempt)}</q>, the critique'
    if _is_missing(rows, wrong - 1):
        said, critique = "left out", rows[wrong - 1][2]
    token = min(tokens, key=record.advantage.__getitem__)
    return (
        f'<p class="verdict">The student {said} <q class="good">{_body(critique)}</q>. '
        f"Chance of token <b>{isolated(record.tokens[token].strip())}</b>: "
        f"<b>{probability(record.student_logprob[token])}</b> for the student, "
        f"<b>{probability(record.teacher_logprob[token])}</b> for the teacher.</p>"
    )


def heat_map(record: TokenAnalysis, *, context_name: str) -> str:
    """Return the attempt's rows, each beside the critique's step of the same tag.

    Steps are called right, wrong or missing only where the task's checker has judged them.

    Args:
        record: the attempt.
        context_name: what the teacher saw beside the question, such as "critique".
    """
    rows = align(record)
    wrong = _wrong_row(record, rows)
    # From here on nothing is known: behind an error, or where an attempt broke off.
    unjudged = len(rows) if wrong is None else wrong
    if wrong is None and not record.correct:
        unjudged = max((i for i, (tokens, *_) in enumerate(rows) if tokens), default=0)
    glued = _glued(record.tokens, record.response)
    html = [
        '<div class="row head"><span></span><span>The student&rsquo;s attempt</span>'
        f"<span>The {plain(context_name)}, seen by the teacher only</span></div>"
    ]
    for i, (tokens, attempt, critique) in enumerate(rows):
        label, kind = "", ""
        if i == wrong:
            label, kind = '<b class="flag">first error</b>', " wrong"
        elif wrong is None and not record.steps_judged:
            pass  # nobody has judged this step
        elif tokens is None:
            label = '<span class="note">missing</span>'
        elif i < unjudged and _tag(attempt):
            label = '<span class="note">right</span>'
        cells = "".join(_cell(record, t, glued[t]) for t in tokens or ())
        html.append(
            f'<div class="row{kind}"><span class="label">{label}</span>'
            f'<span class="attempt">{cells}</span>{_critique(attempt, critique)}</div>'
        )
    return f'<div class="heat">{"".join(html)}</div>'


def align(record: TokenAnalysis) -> list[Row]:
    """Pair the steps of attempt and critique by their tags; what only one has stands alone."""
    attempts = list(zip_longest(step_tokens(record.tokens), split_steps(record.response)))
    critiques = split_steps(record.context)
    matcher = SequenceMatcher(
        a=[_tag(text or "") for _, text in attempts],
        b=[_tag(text) for text in critiques],
        autojunk=False,
    )
    rows = []
    for _, a0, a1, b0, b1 in matcher.get_opcodes():
        for attempt, critique in zip_longest(attempts[a0:a1], critiques[b0:b1]):
            tokens, text = attempt or (None, None)
            rows.append((tokens, text or "", critique or ""))
    return rows


def step_tokens(tokens: Sequence[str]) -> list[range]:
    """Cut tokens into steps; a tag may be spread over several tokens."""
    text = "".join(tokens)
    ends = list(accumulate(map(len, tokens)))
    begins = {next(i for i, end in enumerate(ends) if end > m.start()) for m in _TAG.finditer(text)}
    cuts = sorted({0, len(tokens)} | begins)
    return [range(start, stop) for start, stop in pairwise(cuts)]


def split_steps(text: str) -> list[str]:
    """Cut a text at its step tags."""
    cuts = [0, *(match.start() for match in _TAG.finditer(text)), len(text)]
    steps = (text[start:stop].strip() for start, stop in pairwise(cuts))
    return [step for step in steps if step]


def probability(logprob: float) -> str:
    """Return a log-probability as a percentage."""
    percent = 100 * math.exp(logprob)
    if percent < 0.01:
        return "&lt;0.01&nbsp;%"
    return f"{percent:.1f}&nbsp;%" if percent >= 10 else f"{percent:.2g}&nbsp;%"


def _lowest_advantage(record: TokenAnalysis) -> float:
    start, stop = record.wrong_tokens or (0, len(record.tokens))
    return min(record.advantage[start:stop])


def _wrong_row(record: TokenAnalysis, rows: Sequence[Row]) -> int | None:
    if record.wrong_tokens is None:
        return None
    start = record.wrong_tokens[0]
    return next(i for i, (tokens, _, _) in enumerate(rows) if tokens and start in tokens)


def _is_missing(rows: Sequence[Row], i: int) -> bool:
    return i >= 0 and rows[i][0] is None


def _follows_a_right_step(record: TokenAnalysis) -> bool:
    rows = align(record)
    wrong = _wrong_row(record, rows)
    return wrong is not None and wrong > 0 and not _is_missing(rows, wrong - 1)


def _tag(step: str) -> str:
    match = _TAG.match(step)
    return match[0] if match else ""


def _body(step: str) -> str:
    body = _TAG.sub("", step).strip()
    return isolated(body) if body else "nothing"


def _glued(tokens: Sequence[str], response: str) -> list[bool]:
    """Tell which tokens follow the one before without a blank, such as the digits of a number."""
    glued, position = [], 0
    for token in tokens:
        rest = response[position:]
        blanks = len(rest) - len(rest.lstrip())
        bare = token.strip()
        found = bool(bare) and rest.startswith(bare, blanks)
        glued.append(found and position > 0 and blanks == 0)
        if found:
            position += blanks + len(bare)
    return glued


def _cell(record: TokenAnalysis, i: int, glued: bool) -> str:
    advantage = record.advantage[i]
    strength = min(1.0, abs(advantage) / FULL_COLOUR)
    classes = ["t", "neg" if advantage < 0 else "pos"]
    classes += ["glued"] * glued + ["strong"] * (strength > 0.6)
    title = (
        f"{plain(record.tokens[i])}&#10;advantage {advantage:+.3f} nats&#10;"
        f"student {probability(record.student_logprob[i])}, "
        f"teacher {probability(record.teacher_logprob[i])}&#10;"
        f"KL {record.kl[i]:.3f} nats&#10;entropy {record.entropy[i]:.3f} nats"
    )
    number = f"<small>{advantage:+.1f}</small>" if abs(advantage) >= NUMBERED else ""
    return (
        f'<span class="{" ".join(classes)}" style="--a:{strength:.2f}" title="{title}">'
        f"{isolated(record.tokens[i].strip())}{number}</span>"
    )


def _critique(attempt: str, critique: str) -> str:
    """Return the critique's step: copied, rewritten (with the changed words marked), or added."""
    if not critique:
        return '<span class="critique copied"><em>left out</em></span>'
    old, new = attempt.split(), critique.split()
    if old == new:
        return f'<span class="critique copied">{isolated(critique)}<em>copied</em></span>'
    words = []
    matcher = SequenceMatcher(a=old, b=new, autojunk=False)
    for kind, _, _, start, stop in matcher.get_opcodes():
        text = plain(" ".join(new[start:stop]))
        if text:
            words.append(text if kind == "equal" else f"<mark>{text}</mark>")
    done = "rewritten" if attempt else "added"
    return f'<span class="critique rewritten"><bdi>{" ".join(words)}</bdi><em>{done}</em></span>'
