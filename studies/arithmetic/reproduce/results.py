"""docs/results: README.md with tables and claims, results.json with every figure, plots as SVG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill

from selfdistill.analysis.localisation import localisation_table
from selfdistill.evaluation.tables import MISSING, TextTable, number, percent
from selfdistill.runlog import write_atomically
from studies.arithmetic.reproduce.arms import SIDE_ARMS, Scale
from studies.arithmetic.reproduce.claims import Claim, Order, localisation_claims, orders
from studies.arithmetic.reproduce.findings import (
    Copying,
    Dose,
    Findings,
    Main,
    Row,
    Stratum,
    row_of,
)
from studies.arithmetic.reproduce.job_list import RATES_SEED
from studies.arithmetic.reproduce.jobs import TEACHER_SAMPLES
from studies.arithmetic.reproduce.machine import Environment
from studies.arithmetic.reproduce.page_text import PageText
from studies.arithmetic.reproduce.plots import gap_plot_name, make_plots

TEXT = PageText(
    Path(__file__).with_name("results.md"), page="README.md", command="selfdistill reproduce"
)


def write_results(findings: Findings, scale: Scale, where: Environment, folder: Path) -> list[Path]:
    """Write everything into a folder and return the files."""
    claims = localisation_claims(findings)
    settings = orders(findings)
    plots = make_plots(findings)
    data = {
        "environment": asdict(where),
        "scale": asdict(scale),
        "orders": [asdict(order) for order in settings],
        "localisation": [asdict(claim) for claim in claims],
        **asdict(findings),
    }
    files = {
        "README.md": readme(findings, settings, claims, scale, where, plots),
        "results.json": json.dumps(data, indent=1) + "\n",
        **plots,
    }
    for name, text in files.items():
        write_atomically(folder / name, text)
    return [folder / name for name in files]


def readme(
    findings: Findings,
    settings: Sequence[Order],
    claims: Sequence[Claim],
    scale: Scale,
    where: Environment,
    plots: dict[str, str],
) -> str:
    """Return the page."""
    parts = [TEXT.text("head"), _setting(scale, where), _claims(settings, claims)]
    if findings.main is not None:
        parts.append(_main_section(findings.main, scale))
    if findings.difficulty is not None:
        parts.append(_difficulty_section(findings.difficulty, scale))
    if findings.copying is not None:
        parts.append(_copying_section(findings.copying, scale))
    if findings.wording is not None:
        parts.append(_wording_section(findings.wording, scale))
    if findings.rates:
        parts.append(_rates_section(findings, scale))
    parts += [TEXT.text("built in"), _limits(scale)]
    text = "\n".join(parts)
    for name in plots:
        assert f"({name})" in text, f"{name} is not shown"
    return text


def _setting(scale: Scale, where: Environment) -> str:
    items = TEXT.text(
        "setting items",
        **asdict(where) | {"minutes": f"{where.minutes:.0f}", "commit": where.commit or "unknown"},
        steps=scale.milestones[-1],
        rates=", ".join(f"{rate:g}" for rate in scale.rates),
        rate_steps=scale.rate_steps,
        rates_seed=RATES_SEED,
        evaluate_every=scale.evaluate_every,
        dev_problems=scale.dev_problems,
        dev_samples=scale.dev_samples,
        milestones=" and ".join(map(str, scale.milestones)),
        problems=scale.problems,
        samples=scale.samples,
        side_problems=scale.side_problems,
        seeds=", ".join(map(str, scale.seeds)),
        side_seeds=", ".join(map(str, scale.side_seeds)),
        wording_seeds=", ".join(map(str, scale.wording_seeds)),
    )
    return f"{TEXT.text('setting', command=where.command)}\n{_wrap(items)}\n"


def _wrap(text: str) -> str:
    """Break the lines of a list anew; an item starts with "- "."""
    items = " ".join(text.split()).split(" - ")
    return "\n".join(
        fill(item if i == 0 else f"- {item}", 100, subsequent_indent="  ", break_on_hyphens=False)
        for i, item in enumerate(items)
    )


def _claims(settings: Sequence[Order], claims: Sequence[Claim]) -> str:
    note = TEXT.note("claims note")
    tables = []
    if settings:
        rows = [
            [
                order.problems,
                order.regime,
                str(order.steps),
                order.wording,
                percent(order.stepalign_refsol, sign=True),
                percent(order.refsol_grpo, sign=True),
                percent(order.stepalign_grpo, sign=True),
                order.above_refsol,
                order.whole,
            ]
            for order in settings
        ]
        head = [
            "problems",
            "equal",
            "steps",
            "RefSol's wording",
            "StepAlignFB - RefSol",
            "RefSol - GRPO",
            "StepAlignFB - GRPO",
            "StepAlignFB > RefSol",
            "StepAlignFB > RefSol > GRPO",
        ]
        tables += [_where_it_holds(settings), TextTable("Accuracy", head, rows, note).markdown()]
    if claims:
        cells = [[claim.text, claim.measured, claim.holds] for claim in claims]
        title = "Advantage by token, base solver, first wrong step 2 or later"
        tables.append(TextTable(title, ["", "measured", "holds"], cells).markdown())
    return "\n\n".join([TEXT.text("claims").strip(), *tables])


def _where_it_holds(settings: Sequence[Order]) -> str:
    """Count the answers to the two claims about accuracy, and list where the whole order holds."""

    def counts(answers: Sequence[str]) -> str:
        return ", ".join(
            f"{answer}: {answers.count(answer)}" for answer in ("yes", "no", "not separated")
        )

    distinct = [order.above_refsol for order in settings if not order.repeated]
    lines = [
        f"- StepAlignFB > RefSol, {len(distinct)} comparisons (problems, rollouts, steps, "
        f"wording): {counts(distinct)}.",
        f"- StepAlignFB > RefSol > GRPO, {len(settings)} settings (with what is equal to GRPO): "
        f"{counts([order.whole for order in settings])}.",
    ]
    lines += [
        f"  - yes: {o.problems} problems, {o.regime}, {o.steps} steps, {o.wording} wording"
        for o in settings
        if o.whole == "yes"
    ]
    return "\n".join(lines)


def _row_cells(row: Row) -> list[str]:
    tokens = row.metrics["mean_tokens"]
    return [
        row.label,
        str(row.steps),
        percent(row.metrics["avg_at_k"]),
        percent(row.metrics["maj_at_k"]),
        percent(row.metrics["pass_at_k"]),
        number(tokens, ".1f"),
        f"{100 * row.strict:.1f} %",
        MISSING if row.learning_rate is None else f"{row.learning_rate:g}",
        ", ".join(f"{100 * value:.1f}" for value in row.per_seed) or MISSING,
        ", ".join(map(str, row.best_steps)) or MISSING,
    ]


def _row_table(title: str, rows: Sequence[Row], *, samples: int, note: str = "") -> TextTable:
    diverged = [f"{row.diverged} run(s) of {row.label} diverged." for row in rows if row.diverged]
    k = samples
    return TextTable(
        title,
        [
            "",
            "steps",
            f"Avg@{k}",
            f"Maj@{k}",
            f"Pass@{k}",
            "tokens an answer",
            "every step right",
            "learning rate",
            "Avg by seed",
            "best step",
        ],
        [_row_cells(row) for row in rows],
        " ".join([note, *diverged]).strip(),
    )


def _main_section(main: Main, scale: Scale) -> str:
    table = _row_table(
        f"{scale.problems} test problems x {scale.samples}, {len(scale.seeds)} training seeds",
        [main.base, main.teacher, *main.rows],
        samples=scale.samples,
        note=TEXT.note("main note", teacher_samples=TEACHER_SAMPLES),
    )
    return TEXT.text("main", table=table.markdown())


def _difficulty_section(strata: Sequence[Stratum], scale: Scale) -> str:
    labels = [arm.label for arm in SIDE_ARMS]
    rows = [
        [
            f"{s.predicted[0]:g} to {s.predicted[1]:g}",
            percent(s.base.metrics["avg_at_k"]),
            percent(s.teacher.metrics["avg_at_k"]),
            str(steps),
            *(percent(row_of(s.rows, label, steps).avg) for label in labels),
        ]
        for s in strata
        for steps in scale.milestones
    ]
    table = TextTable(
        f"Avg@{scale.samples} by difficulty, {scale.side_problems} test problems a stratum, "
        f"{len(scale.side_seeds)} training seeds",
        ["predicted", "base success", "teacher", "steps", *labels],
        rows,
        TEXT.note("difficulty note"),
    )
    plots = "\n\n".join(
        f"![Difference to GRPO after {steps} steps]({gap_plot_name(steps)})"
        for steps in scale.milestones
    )
    return TEXT.text("difficulty", table=table.markdown(), plots=plots)


def _copying_section(copying: Copying, scale: Scale) -> str:
    tokens = {label: figures.later_wrong for label, figures in copying.tokens.items()}
    first = {label: figures.first_wrong for label, figures in copying.tokens.items()}
    later_table = localisation_table("Step 2 or later is the first wrong one", tokens)
    first_table = localisation_table("Step 1 is wrong already", first)
    trained = _row_table(
        f"Training with each, 8 x 1, {scale.problems} test problems",
        copying.rows,
        samples=scale.samples,
        note=TEXT.note("copying note"),
    )
    return TEXT.text(
        "copying",
        later_table=later_table.markdown(),
        first_table=first_table.markdown(),
        trained=trained.markdown(),
    )


def _wording_section(doses: Sequence[Dose], scale: Scale) -> str:
    def cells(dose: Dose) -> list[str]:
        figures = dose.tokens.later_wrong
        return [
            str(dose.dialect),
            f"{100 * dose.share:.0f} %",
            *(percent(row.avg) for row in dose.rows),
            str(dose.rows[0].seeds),
            number(figures.mean_before, "+.2f"),
            number(figures.mean_at, "+.2f"),
            percent(figures.share_at),
            number(dose.tokens.share_times, ".2f"),
            percent(figures.negative_before),
        ]

    table = TextTable(
        f"RefSol, 8 x 1, {scale.problems} test problems, by the wording of the reference",
        [
            "dialect",
            "the solver writes it",
            *(f"Avg@{scale.samples}, {steps} steps" for steps in scale.milestones),
            "seeds",
            "A before",
            "A within",
            "|A| on the wrong step",
            "times this share with StepAlignFB",
            "right tokens with A < -0.1",
        ],
        [cells(dose) for dose in doses],
        TEXT.note("wording note"),
    )
    return TEXT.text("wording", table=table.markdown())


def _rates_section(findings: Findings, scale: Scale) -> str:
    rows = [
        [
            rates.label,
            *(MISSING if value is None else f"{100 * value:.1f} %" for value in rates.dev.values()),
            f"{rates.chosen:g}{' (edge)' if rates.at_edge else ''}",
        ]
        for rates in findings.rates
    ]
    table = TextTable(
        f"Best dev Avg@{scale.dev_samples} by learning rate",
        ["", *(f"{rate:g}" for rate in scale.rates), "chosen"],
        rows,
        TEXT.note("rates note"),
    )
    return TEXT.text("rates", table=table.markdown())


def _limits(scale: Scale) -> str:
    items = TEXT.text(
        "limits items",
        seeds=len(scale.seeds),
        side_seeds=len(scale.side_seeds),
        wording_seeds=len(scale.wording_seeds),
        rates=len(scale.rates),
    )
    return f"{TEXT.text('limits')}\n{_wrap(items)}\n"
