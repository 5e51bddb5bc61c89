"""Attempts as heat maps: one line a step, one coloured cell a token, the critique beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import SequenceMatcher

from selfdistill.analysis.alignment import STEP_TAG, align, is_missing, tag_of, wrong_row
from selfdistill.analysis.report.text import isolated, plain
from selfdistill.analysis.tokens import TokenAnalysis

# Nats of advantage from which on a cell has its full colour, and shows its number.
FULL_COLOUR = 2.0
NUMBERED = 0.5

LEGEND = f"""<div class="legend">
<span>teacher <b>disagrees</b></span>
<span class="scale"><i></i><small>&minus;{FULL_COLOUR:g} nats</small>
<small>&minus;{FULL_COLOUR / 2:g}</small><small>0</small><small>+{FULL_COLOUR / 2:g}</small>
<small>+{FULL_COLOUR:g} nats</small></span>
<span>teacher <b>agrees more</b></span></div>"""


def verdict(record: TokenAnalysis) -> str:
    """Say in words what went wrong in an attempt and what the teacher thinks of it."""
    rows = align(record)
    wrong = wrong_row(record, rows)
    if wrong is None:
        return ""
    tokens, attempt, critique = rows[wrong]
    assert tokens is not None  # the wrong row holds the wrong tokens
    said = f'wrote <q class="bad">{_body(attempt)}</q>, the critique'
    if is_missing(rows, wrong - 1):
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
    wrong = wrong_row(record, rows)
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
        elif i < unjudged and tag_of(attempt):
            label = '<span class="note">right</span>'
        cells = "".join(_cell(record, t, glued[t]) for t in tokens or ())
        html.append(
            f'<div class="row{kind}"><span class="label">{label}</span>'
            f'<span class="attempt">{cells}</span>{_critique(attempt, critique)}</div>'
        )
    return f'<div class="heat">{"".join(html)}</div>'


def probability(logprob: float) -> str:
    """Return a log-probability as a percentage."""
    percent = 100 * math.exp(logprob)
    if percent < 0.01:
        return "&lt;0.01&nbsp;%"
    return f"{percent:.1f}&nbsp;%" if percent >= 10 else f"{percent:.2g}&nbsp;%"


def _body(step: str) -> str:
    body = STEP_TAG.sub("", step).strip()
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
