"""docs/results/mechanisms.md and its long tables, mechanisms.json and the figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from selfdistill.evaluation.tables import MISSING, TextTable, number, percent
from selfdistill.runlog import write_atomically
from studies.arithmetic.mechanisms.answers import TARGET, Answer, answers, reached
from studies.arithmetic.mechanisms.arms import GRPO_MANY, REFERENCES, STEPALIGN, Scale
from studies.arithmetic.mechanisms.findings import Findings, Row
from studies.arithmetic.mechanisms.plots import make_plots, ranked
from studies.arithmetic.reproduce.job_list import RATES_SEED
from studies.arithmetic.reproduce.machine import Environment
from studies.arithmetic.reproduce.page_text import PageText

PAGE, TABLES = "mechanisms.md", "mechanisms-tables.md"

TEXT = PageText(
    Path(__file__).with_name("page.md"),
    page=PAGE,
    command="selfdistill reproduce --study mechanisms",
)


def write_results(findings: Findings, scale: Scale, where: Environment, folder: Path) -> list[Path]:
    """Write everything into a folder and return the files."""
    found = answers(findings)
    plots = make_plots(findings)
    data = {
        "environment": asdict(where),
        "scale": asdict(scale),
        "answers": [
            {
                "question": answer.question.text,
                "arm": answer.arm.label,
                "against": answer.question.against.label,
                "difference": asdict(answer.difference),
                "verdict": answer.verdict,
            }
            for answer in found
        ],
        **asdict(findings),
    }
    files = {
        PAGE: page(findings, found, scale, where),
        TABLES: tables(findings, scale),
        "mechanisms.json": json.dumps(data, indent=1) + "\n",
        **plots,
    }
    for name, text in files.items():
        write_atomically(folder / name, text)
    return [folder / name for name in files]


def page(findings: Findings, found: Sequence[Answer], scale: Scale, where: Environment) -> str:
    """Return what a person reads in five minutes: the figure, a table, what to use when."""
    parts = [TEXT.text("head", steps=scale.steps)]
    if findings.rows:
        parts += [
            _target(findings, scale),
            "![Accuracy by arm](mechanisms.svg)\n",
            _short_table(findings, scale).markdown(),
        ]
    if found:
        note = TEXT.note("answers note", samples=scale.samples)
        parts += ["## What to use when\n", _answers_table(found, note).markdown()]
    if findings.missing:
        parts.append(f"Not finished: {', '.join(findings.missing)}.\n")
    limits = TEXT.text(
        "limits",
        **asdict(where) | {"minutes": f"{where.minutes:.0f}", "commit": where.commit or "unknown"},
        steps=scale.steps,
        rates=", ".join(f"{rate:g}" for rate in scale.rates),
        rates_seed=RATES_SEED,
        evaluate_every=scale.evaluate_every,
        dev_problems=scale.dev_problems,
        dev_samples=scale.dev_samples,
        problems=scale.problems,
        samples=scale.samples,
        seeds=", ".join(map(str, scale.seeds)),
        count=len(found),
    )
    return "\n".join([*parts, TEXT.text("built in"), limits])


def tables(findings: Findings, scale: Scale) -> str:
    """Return the page of long tables."""
    rows = ranked(findings)
    parts = [TEXT.text("tables head")]
    if rows:
        parts += [
            _long_table(findings, rows, scale).markdown(),
            "![Different right traces by arm](mechanisms-diversity.svg)\n",
            _differences_table(rows, scale).markdown(),
            _outside_table(rows, scale).markdown(),
            _rates_table(rows, scale).markdown(),
        ]
    return "\n".join(parts)


def _target(findings: Findings, scale: Scale) -> str:
    labels = reached(findings)
    best = max(
        (row for row in findings.rows.values() if row.key != GRPO_MANY.key),
        key=lambda row: row.avg.value,
        default=None,
    )
    if best is None:
        return ""
    said = ", ".join(labels) or f"{best.label}, {percent(best.avg)}"
    name = "target yes" if labels else "target no"
    return TEXT.text(name, target=f"{100 * TARGET:g}", steps=scale.steps, arms=said)


def _short_table(findings: Findings, scale: Scale) -> TextTable:
    k = scale.samples
    rows = [
        [
            row.label,
            percent(row.avg),
            percent(row.differences.get(STEPALIGN.key), sign=True),
            f"{100 * row.pass_at_k.value:.1f} %",
            f"{row.distinct.value:.1f}",
            f"{row.surprisal.value:.2f}",
        ]
        for row in ranked(findings)
    ]
    return TextTable(
        f"{scale.problems} test problems x {k}, {len(scale.seeds)} training seeds",
        ["", f"Avg@{k}", "to StepAlignFB", f"Pass@{k}", "different right traces", "entropy"],
        rows,
    )


def _answers_table(found: Sequence[Answer], note: str) -> TextTable:
    before = [None, *(answer.question for answer in found)]
    rows = [
        [
            "" if answer.question is asked else answer.question.text,
            answer.arm.label,
            percent(answer.difference, sign=True),
            answer.verdict,
            answer.question.advice[answer.verdict],
        ]
        for answer, asked in zip(found, before[:-1], strict=True)
    ]
    head = ["question", "arm", "difference", "it is", "so"]
    return TextTable("Answers", head, rows, note)


def _long_table(findings: Findings, rows: Sequence[Row], scale: Scale) -> TextTable:
    k = scale.samples
    note = (
        ""
        if findings.teacher is None
        else f"The solver before training with a critique of its attempt: Avg "
        f"{percent(findings.teacher)}."
    )
    return TextTable(
        f"{scale.problems} test problems x {k}",
        [
            "",
            f"Avg@{k}",
            f"Pass@{k}",
            "different right traces",
            "entropy a token",
            "tokens an answer",
            "Avg by seed",
        ],
        [
            [
                row.label,
                percent(row.avg),
                percent(row.pass_at_k),
                number(row.distinct, ".2f"),
                number(row.surprisal, ".3f"),
                number(row.tokens, ".1f"),
                ", ".join(f"{100 * value:.1f}" for value in row.per_seed),
            ]
            for row in rows
        ],
        note,
    )


def _differences_table(rows: Sequence[Row], scale: Scale) -> TextTable:
    return TextTable(
        f"Avg@{scale.samples} minus that of each reference, in points, paired by problem",
        ["", *(arm.label for arm in REFERENCES)],
        [
            [row.label, *(percent(row.differences.get(arm.key), sign=True) for arm in REFERENCES)]
            for row in rows
            if row.differences
        ],
    )


def _outside_table(rows: Sequence[Row], scale: Scale) -> TextTable:
    head = [
        f"{name} ({', '.join(map(str, counts))} operations), {what}"
        for name, counts in scale.outside.items()
        for what in ("right", "steps")
    ]
    cells = [
        [
            row.label,
            *(
                percent(interval)
                for name in scale.outside
                for interval in (row.outside[name].right, row.outside[name].leading)
            ),
        ]
        for row in rows
    ]
    title = f"Outside of the training range, {scale.outside_problems} problems each"
    return TextTable(title, ["", *head], cells, TEXT.note("outside note"))


def _rates_table(rows: Sequence[Row], scale: Scale) -> TextTable:
    cells = [
        [
            row.label,
            *(MISSING if v is None else f"{100 * v:.1f} %" for v in row.dev.values()),
            MISSING if row.learning_rate is None else f"{row.learning_rate:g}",
            ", ".join(map(str, row.best_steps)),
            f"{row.seconds / 60:.1f}",
        ]
        for row in rows
        if row.dev
    ]
    return TextTable(
        f"Best dev Avg@{scale.dev_samples} by learning rate",
        ["", *(f"{rate:g}" for rate in scale.rates), "chosen", "best step", "thread minutes"],
        cells,
        TEXT.note("rates note"),
    )
