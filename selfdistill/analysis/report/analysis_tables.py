"""An analysis as tables and sentences, for the terminal, Markdown and the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from selfdistill.analysis.localisation import (
    GEMMS,
    KEPT,
    NEGATIVE,
    MaskEffect,
    Overall,
    localisation_table,
)
from selfdistill.analysis.run import MethodAnalysis, RunAnalysis
from selfdistill.evaluation.tables import MISSING, TextTable, number, percent


def analysis_tables(analysis: RunAnalysis) -> list[TextTable]:
    """Return the tables of an analysis, in the order of the page."""
    methods = analysis.methods
    tables = []
    if analysis.knows_steps:
        note = (
            "95 % bootstrap intervals over problems. A: advantage, log p_teacher - log p_student "
            "of the sampled token."
        )
        for title, field in (
            ("First error after a right step", "later_wrong"),
            ("First error in step 1", "first_wrong"),
            ("All attempts with a wrong step, the two kinds mixed", "all_wrong"),
        ):
            tables.append(
                localisation_table(
                    title,
                    {m.label: getattr(m, field) for m in methods},
                    times={m.label: m.share_times for m in methods[1:]}
                    if field == "later_wrong"
                    else None,
                    note=note,
                )
            )
            note = ""
    return [*tables, overall_table(methods), mask_table(methods)]


def overall_table(methods: Sequence[MethodAnalysis]) -> TextTable:
    """Return the figures of whole attempts, right ones beside wrong ones."""
    columns = [
        (f"{m.label}: {kind}", getattr(m, kind)) for m in methods for kind in ("wrong", "right")
    ]
    rows: list[tuple[str, Callable[[Overall], str]]] = [
        ("attempts (problems)", lambda f: f"{f.attempts} ({f.problems})"),
        ("mean A of a token (nats)", lambda f: number(f.mean)),
        ("mean |A| of a token", lambda f: number(f.magnitude, ".3f")),
        ("mean KL of a token", lambda f: number(f.kl, ".3f")),
        (f"tokens with A < {NEGATIVE:g}", lambda f: percent(f.negative)),
    ]
    return TextTable(
        "Whole attempts",
        ["", *(name for name, _ in columns)],
        [[label, *(show(figures) for _, figures in columns)] for label, show in rows],
        "Right: right answer and no wrong step.",
    )


def mask_table(methods: Sequence[MethodAnalysis]) -> TextTable:
    """Return the suggested mask of each method."""
    rows: list[tuple[str, Callable[[MaskEffect], str]]] = [
        ("threshold (nats)", lambda e: f"{e.threshold:g}"),
        ("sign", lambda e: e.sign),
        ("active tokens, rho", lambda e: percent(e.rho)),
        ("of the sum of |A| they keep", lambda e: percent(e.advantage_kept)),
        ("of the KL they keep", lambda e: percent(e.kl_kept)),
        *((f"GEMM time saved, {name}", partial(_saved, name)) for name in GEMMS),
    ]
    return TextTable(
        "Suggested advantage masks (method.loss.advantage_mask)",
        ["", *(m.label for m in methods)],
        [
            [label, *(MISSING if m.suggested is None else show(m.suggested) for m in methods)]
            for label, show in rows
        ],
        f"The mask with the fewest tokens that keeps {KEPT:.0%} of the sum of |A|, over attempts "
        f"as they come. {GEMM_NOTE}",
    )


def _saved(strategy: str, effect: MaskEffect) -> str:
    return f"{effect.saved[strategy]:.0%}"


GEMM_NOTE = (
    "Saved is arithmetic and no measurement: GEMMs of the loss at this rho against rho = 1 in the "
    "same strategy, store 2 + 2 rho (frozen head 2 + rho), recompute 2 + 4 rho (2 + 3 rho). What "
    "the mask does to learning is not told by these figures."
)


def masks_table(method: MethodAnalysis) -> TextTable:
    """Return all masks that were tried for one method."""
    rules = {"any": "|A| > {:g}", "negative": "A < -{:g}", "positive": "A > {:g}"}
    return TextTable(
        f"Advantage masks: {method.label}",
        ["active", "rho", "|A| kept", "KL kept", *(f"saved, {name}" for name in GEMMS)],
        [
            [
                rules[effect.sign].format(effect.threshold),
                *map(percent, (effect.rho, effect.advantage_kept, effect.kl_kept)),
                *(_saved(name, effect) for name in GEMMS),
            ]
            for effect in method.masks
        ],
    )


def missing_note(analysis: RunAnalysis) -> str:
    """Say what the analysis cannot show, or nothing."""
    notes = [
        f"{m.label} had no context for {m.without_context} attempts; its figures leave them out."
        for m in analysis.methods
        if m.without_context
    ]
    if not analysis.wrong:
        notes.append("No attempt went wrong: there is no error to look at.")
    elif not analysis.knows_steps:
        notes.append(NO_STEPS.format(analysis.task))
    return " ".join(notes)


NO_STEPS = (
    "The checker of task {!r} judges answers and marked no wrong step, so nothing can be said "
    "about before, at and after the first error, nor about how much of the advantage lies on it. "
    "Shown are whole attempts, wrong ones beside right ones, and what masks keep."
)


def summary_line(analysis: RunAnalysis) -> str:
    """Say in a sentence what was looked at."""
    where = "before training" if not analysis.step else f"after step {analysis.step}"
    return (
        f"{analysis.rollouts} attempts at {analysis.problems} {analysis.split} problems by the "
        f"{analysis.checkpoint} checkpoint ({where}), {percent(analysis.solved)} with the right "
        f"answer. Scored: {analysis.wrong} that went wrong, and the first {analysis.as_they_come} "
        "as they came."
    )
