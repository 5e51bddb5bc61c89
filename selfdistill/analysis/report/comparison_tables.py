"""A comparison of runs as tables, for the terminal, Markdown and the page."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.analysis.comparison import METRICS, Comparison, Difference, Final
from selfdistill.evaluation.tables import MISSING, TextTable, number, percent


def final_table(finals: Sequence[Final]) -> TextTable:
    """Return the groups' accuracy and answer length."""
    rows = [
        [
            f.label,
            f"{f.split}, {f.problems} x {f.samples}",
            str(f.seeds),
            *(percent(f.metrics[m]) for m in METRICS[:3]),
            number(f.metrics["mean_tokens"], ".1f")
            if f.metrics["mean_tokens"]
            else f"{f.mean_tokens:.1f}",
        ]
        for f in finals
    ]
    chosen = " A row of the dev split is the best step's, which was chosen there: optimistic."
    return TextTable(
        "Final accuracy",
        ["", "problems x k", "seeds", "Avg@k", "Maj@k", "Pass@k", "tokens an answer"],
        rows,
        "95 % intervals over problems and seeds." + chosen * any(f.split == "dev" for f in finals),
    )


def difference_table(differences: Sequence[Difference]) -> TextTable:
    """Return the paired differences, in points and in tokens."""
    rows = [
        [
            f"{d.second} minus {d.first}",
            d.split,
            *(percent(d.metrics[m], sign=True) for m in METRICS[:3]),
            number(d.metrics["mean_tokens"], "+.1f"),
        ]
        for d in differences
    ]
    return TextTable(
        "Differences on the same problems",
        ["", "problems", "Avg@k, points", "Maj@k", "Pass@k", "tokens an answer"],
        rows,
        "Paired by problem, 95 % intervals; one that leaves out 0 is a difference beyond chance.",
    )


def settings_table(comparison: Comparison) -> TextTable:
    """Return what differs in the configurations."""
    names = [group.label for group in comparison.groups]
    return TextTable(
        "What differs in the configurations",
        ["", *names],
        [
            [key, *(MISSING if values[n] is None else str(values[n]) for n in names)]
            for key, values in comparison.settings.items()
        ],
        "" if comparison.settings else "Nothing but the seed.",
    )


def runs_table(comparison: Comparison) -> TextTable:
    """Return one row for each run."""
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            best = run.evaluations[run.best]
            rows.append(
                [
                    run.name,
                    group.label,
                    str(run.config.get("seed", MISSING)),
                    str(run.steps[-1]),
                    f"{run.steps[-1] * run.rollouts_per_step:,}",
                    str(run.steps[run.best]),
                    percent(best.avg_at_k),
                    MISSING if run.held_out is None else percent(run.held_out.avg_at_k),
                ]
            )
    return TextTable(
        "The runs",
        [
            "",
            "group",
            "seed",
            "steps",
            "rollouts",
            "best step",
            "dev Avg@k there",
            "held-out Avg@k",
        ],
        rows,
        "Intervals here are over problems only.",
    )
