from __future__ import annotations

from dataclasses import dataclass, replace

from token_records import record

from selfdistill.analysis.localisation import localise, mask_effects, overall, suggest
from selfdistill.evaluation.intervals import Interval
from selfdistill.prediction.advice import Advice, advise
from selfdistill.prediction.probe import ContextProbe, Probe


@dataclass(frozen=True)
class Given:
    label: str
    gain: Interval | None
    mixed_groups: float | None = None


def points(value: float, spread: float = 5) -> Interval:
    return Interval(value / 100, (value - spread) / 100, (value + spread) / 100)


def context(
    label: str = "refsol",
    *,
    gap: float = 40,
    before: float = 0.01,
    at: float = -2.0,
    right: float = 0.01,
) -> ContextProbe:
    wrong = record([before] * 8 + [at] * 2, (8, 10))
    fine = replace(record([right] * 10, None), correct=True)
    records = [wrong, fine]
    return ContextProbe(
        label=label,
        taught=1.0,
        teacher=points(80),
        gap=points(gap),
        right=overall([fine]),
        wrong=overall([wrong]),
        localisation=localise([wrong]),
        active=Interval(0.2, 0.1, 0.3),
        mask=suggest(mask_effects(records)),
        masked=None,
    )


def advice(contexts: list[ContextProbe], forecasts: list[Given]) -> Advice:
    found = Probe(64, 192, points(40), 0.03, None, None, tuple(contexts), 50.0, 1e-3, 1e-3, 1.0)
    return advise(found, forecasts)


def test_the_highest_forecast_wins_and_a_near_one_is_named() -> None:
    contexts = [context("stepalign"), context("refsol")]
    grpo = Given("grpo", points(10), 2.0)
    found = advice(contexts, [Given("stepalign", points(50)), Given("refsol", points(43)), grpo])
    assert found.method == "stepalign"
    assert "stepalign has the highest forecast: +50.0 [+45.0, +55.0] points." in found.reasons[0]
    assert found.reasons[1] == "Its interval overlaps that of refsol."
    found = advice(contexts[:1], [Given("stepalign", points(20)), Given("grpo", points(60), 7.0)])
    assert (found.method, found.mask) == ("grpo", None)


def test_neither_helps_without_a_gap_and_without_mixed_groups() -> None:
    found = advice([context(gap=2)], [Given("refsol", None), Given("grpo", None, 0.2)])
    assert found.method is None
    text = " ".join(found.reasons)
    assert "not clearly better than the student (+2.0 [-3.0, +7.0] points)" in text
    assert "GRPO would have 0.2 groups a step" in text
    assert "Neither a teacher nor rewards help much here" in text
    # With mixed groups there is GRPO.
    found = advice([context(gap=2)], [Given("refsol", None), Given("grpo", None, 5.0)])
    assert found.method == "grpo"
    # A forecast that may be nothing is none to begin with.
    found = advice([context()], [Given("refsol", points(3)), Given("grpo", points(1), 0.5)])
    assert found.method is None


def test_without_a_law_the_gap_decides() -> None:
    contexts = [context("refsol", gap=30), context("stepalign", gap=45)]
    forecasts = [Given("refsol", None), Given("stepalign", None), Given("grpo", None, 6.0)]
    found = advice(contexts, forecasts)
    assert found.method == "stepalign"
    assert "no such ceiling" in found.reasons[0]
    found = advice(contexts, [*forecasts[:2], Given("grpo", None, 0.5)])
    assert "few groups for GRPO: 0.5 a step" in found.reasons[0]


def test_a_teacher_that_disputes_right_steps_is_not_chosen() -> None:
    found = advice([context(before=-1.5)], [Given("refsol", None), Given("grpo", None, 5.0)])
    assert found.method == "grpo"
    assert any("disputes steps that are right (-1.50 nats" in reason for reason in found.reasons)


def test_a_mask_where_the_disagreement_is_about_errors() -> None:
    found = advice([context()], [Given("refsol", points(50))])
    assert found.mask == "{threshold: 0.01, sign: any}"
    assert "keeps 90 % of the disagreement on 10% of the tokens" in found.reasons[-1]
    found = advice([context(right=-0.5)], [Given("refsol", points(50))])
    assert found.mask is None
    assert "a mask would keep wording, not errors" in found.reasons[-1]
    found = advice([context(before=-0.9, at=-0.9, right=0.4)], [Given("refsol", points(50))])
    assert "none keeps 90 % of the disagreement on less than half" in found.reasons[-1]
