"""A prediction as tables, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.tables import MISSING, TextTable, number, percent
from selfdistill.prediction.forecast import Prediction
from selfdistill.prediction.probe import ContextProbe


def prediction_tables(prediction: Prediction) -> list[TextTable]:
    """Return what was measured, and what it means."""
    tables = [forecast_table(prediction)]
    if prediction.probe.contexts:
        tables.insert(0, context_table(prediction))
    return tables


def context_table(prediction: Prediction) -> TextTable:
    """Return a column for each teacher: how far it is ahead, and where it disagrees."""
    probe = prediction.probe
    contexts = probe.contexts

    def row(label: str, cells: Sequence[str]) -> list[str]:
        return [label, *cells]

    def of(label: str, show: str, *places: Interval | None) -> list[str]:
        cells = (percent(p) if show == "share" else number(p) for p in places)
        return row(label, list(cells))

    rows = [
        row("attempts with a context", [f"{c.taught:.0%}" for c in contexts]),
        of("student, share right", "share", *(probe.student for _ in contexts)),
        of("teacher, share right", "share", *(c.teacher for c in contexts)),
        row("gap, points", [percent(c.gap, sign=True) for c in contexts]),
        of("mean A of right attempts (nats)", "nats", *(c.right.mean for c in contexts)),
        of("mean A of wrong attempts", "nats", *(c.wrong.mean for c in contexts)),
        of("mean A before the first wrong step", "nats", *(_before(c) for c in contexts)),
        of("share of |A| on the wrong step", "share", *(_share_at(c) for c in contexts)),
        of("share of tokens with |A| > 0.1", "share", *(c.active for c in contexts)),
        row("tokens that hold 90 % of |A|", [_mask(c) for c in contexts]),
    ]
    if any(c.masked for c in contexts):
        masked = (c.masked.rho if c.masked else None for c in contexts)
        rows.append(of("tokens that the configured mask keeps", "share", *masked))
    own, reference = probe.own_surprise, probe.reference_surprise
    rarity = (
        ""
        if own is None or reference is None
        else f" The student gives references {reference.value:.3f} nats a token and its own right "
        f"answers {own.value:.3f}: the more, the rarer their wording."
    )
    return TextTable(
        f"Before training: {probe.rollouts} rollouts on {probe.problems} training problems of "
        f"{prediction.task}",
        ["", *(c.label for c in contexts)],
        rows,
        f"A = log p(token | context) - log p(token) of the student's own attempts.{rarity}",
    )


def forecast_table(prediction: Prediction) -> TextTable:
    """Return a row for each method: how much it should bring at the configured budget."""
    rows = [
        [
            forecast.label,
            f"{forecast.prompts} x {forecast.group_size}",
            percent(forecast.gain, sign=True),
            MISSING if forecast.mixed_groups is None else f"{forecast.mixed_groups:.1f}",
        ]
        for forecast in prediction.forecasts
    ]
    return TextTable(
        f"Forecast after {prediction.steps} steps, points of Avg@{prediction.samples}",
        ["", "prompts x rollouts", "gain", "mixed groups a step"],
        rows,
        _note(prediction),
    )


def cost_line(prediction: Prediction) -> str:
    """Say what a step and the probe cost."""
    cost = prediction.cost
    if cost.step is None or cost.share is None:
        return f"The probe took {cost.probe:.0f} seconds."
    return (
        f"A step should take {cost.step:.2g} seconds at the speed of this probe, which took "
        f"{cost.probe:.0f} seconds, {cost.share:.0%} of the training with its evaluations."
    )


def _note(prediction: Prediction) -> str:
    fitted = (
        f"The laws were fitted on a miniature, a solver of 2.2 M parameters on chained arithmetic "
        f"({prediction.fitted_by}); docs/predict.md has what they missed."
    )
    outside = {text for forecast in prediction.forecasts for text in forecast.outside}
    if not outside:
        return fitted
    return (
        f"{fitted} They know nothing about {'; '.join(sorted(outside))}: where a gain is missing, "
        "the gap is what there is: about all that a fixed teacher can teach. It says nothing about "
        "how many steps that takes."
    )


def _before(context: ContextProbe) -> Interval | None:
    return context.localisation.mean_before


def _share_at(context: ContextProbe) -> Interval | None:
    return context.localisation.share_at


def _mask(context: ContextProbe) -> str:
    mask = context.mask
    return (
        MISSING if mask is None else f"{mask.rho.value:.0%} (|A| > {mask.threshold:g}, {mask.sign})"
    )
