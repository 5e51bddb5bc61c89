"""The plots of the results, as SVG files."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.analysis.localisation import Localisation
from selfdistill.analysis.report.charts import COLOURS, Dots, Line, dot_plot, line_plot
from selfdistill.evaluation.intervals import Interval
from studies.arithmetic.reproduce.arms import GRPO, SIDE_ARMS
from studies.arithmetic.reproduce.claims import difference
from studies.arithmetic.reproduce.findings import Copying, Dose, Findings, Main, Stratum, row_of

_ARM_COLOURS = dict(zip((arm.label for arm in SIDE_ARMS), COLOURS, strict=False))


def gap_plot_name(steps: int) -> str:
    return f"difficulty-step-{steps}.svg"


def make_plots(findings: Findings) -> dict[str, str]:
    """Return the plots of the finished studies by file name."""
    plots: dict[str, str] = {}
    if findings.main is not None:
        plots["main.svg"] = _main_plot(findings.main)
        plots["curves.svg"] = _curves_plot(findings.main)
    if findings.difficulty is not None:
        for steps in sorted({row.steps for row in findings.difficulty[0].rows}):
            plots[gap_plot_name(steps)] = _gap_plot(findings.difficulty, steps)
    if findings.copying is not None:
        plots["copying.svg"] = _copying_plot(findings.copying)
    if findings.wording is not None:
        plots["wording.svg"] = _wording_plot(findings.wording)
    return plots


def _main_plot(main: Main) -> str:
    milestones = sorted({row.steps for row in main.rows})
    labels = dict.fromkeys(row.label for row in main.rows)
    rows = [Dots(main.base.label, [main.base.avg] + [None] * (len(milestones) - 1))]
    rows += [
        Dots(label, [row_of(main.rows, label, steps).avg for steps in milestones])
        for label in labels
    ]
    return dot_plot(
        "Accuracy on held-out problems",
        rows,
        [(f"{steps} steps", COLOURS[i]) for i, steps in enumerate(milestones)],
        x_label="right answers (%)",
        scale=100,
        note="Avg with 95 % intervals over problems and training seeds; prompts x rollouts a step",
    )


def _curves_plot(main: Main) -> str:
    """Self-distillation with one rollout a prompt, and GRPO: as the paper compares them."""
    return line_plot(
        "Accuracy on dev problems while training",
        [
            Line(
                arm.label,
                _ARM_COLOURS[arm.label],
                [(point.step, point.avg) for point in main.curves[arm.label]],
            )
            for arm in SIDE_ARMS
        ],
        x_label="training steps",
        y_label="right answers (%)",
        scale=100,
        note="mean over training seeds; prompts x rollouts a step",
    )


def _gap_plot(strata: Sequence[Stratum], steps: int) -> str:
    lines = []
    for arm in SIDE_ARMS:
        points = [
            (100 * s.base.avg.value, gap)
            for s in strata
            if (gap := difference(s.gaps, GRPO.label, arm.label, steps)) is not None
        ]
        if points:
            lines.append(Line(f"{arm.label}", _ARM_COLOURS[arm.label], points))
    return line_plot(
        f"Difference to {GRPO.label}, by difficulty, after {steps} steps",
        lines,
        x_label="base success before training (%)",
        y_label="points of Avg",
        scale=100,
        note="above 0: better than it; paired by problem; prompts x rollouts a step",
    )


def _copying_plot(copying: Copying) -> str:
    def values(figures: Localisation) -> list[Interval | None]:
        return [figures.mean_before, figures.mean_at, figures.mean_after]

    return dot_plot(
        "Advantage around the first wrong step",
        [Dots(label, values(f.later_wrong)) for label, f in copying.tokens.items()],
        [("before it", COLOURS[2]), ("within it", COLOURS[1]), ("after it", COLOURS[0])],
        x_label="mean advantage (nats a token)",
        note="base solver, wrong attempts whose first wrong step is 2 or later",
    )


def _wording_plot(doses: Sequence[Dose]) -> str:
    milestones = [row.steps for row in doses[0].rows]
    return line_plot(
        "RefSol by the wording of its reference",
        [
            Line(
                f"{steps} steps",
                COLOURS[i],
                [(float(x), dose.rows[i].avg) for x, dose in enumerate(doses)],
            )
            for i, steps in enumerate(milestones)
        ],
        x_label="how often the solver writes the reference's dialect of its own accord",
        y_label="right answers (%)",
        x_names=[(float(x), f"{100 * dose.share:.0f} %") for x, dose in enumerate(doses)],
        scale=100,
        note="one rollout a prompt, 8 prompts a step",
    )
