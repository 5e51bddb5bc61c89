"""Findings, claims and pages from finished jobs whose numbers are known."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from finished_plan import SMALL

from selfdistill.analysis.report.charts import Dots, Line, dot_plot, line_plot
from selfdistill.evaluation.intervals import Interval
from studies.arithmetic.reproduce.claims import all_above, localisation_claims, orders
from studies.arithmetic.reproduce.findings import Findings, Gap, collect
from studies.arithmetic.reproduce.machine import environment
from studies.arithmetic.reproduce.results import write_results

Finished = Callable[[Callable[[str], float]], Path]


def near(value: float) -> object:
    return pytest.approx(value, abs=1e-9)


def test_rows_gaps_and_curves(paper_findings: Findings):
    main = paper_findings.main
    assert main is not None
    row = next(r for r in main.rows if r.label == "StepAlignFB, 8 x 1" and r.steps == 50)
    assert (row.seeds, row.per_seed) == (3, [0.75] * 3)
    assert row.metrics["avg_at_k"] == Interval(near(0.75), near(0.75), near(0.75))
    assert row.metrics["pass_at_k"].value == 1.0
    assert row.metrics["mean_tokens"].value == near(10)
    assert row.best_steps == [10] * 3
    gap = next(
        g
        for g in main.gaps
        if (g.first, g.second, g.steps) == ("GRPO, 8 x 8", "StepAlignFB, 8 x 1", 20)
    )
    assert gap.difference == Interval(near(0.5), near(0.5), near(0.5))
    assert [(p.step, p.avg.value) for p in main.curves["GRPO, 8 x 8"]] == [
        (0, near(0.25)),
        (10, near(0.75)),
        (20, near(0.5)),
        (50, near(0.75)),
    ]


def test_the_order_is_found_where_it_is(paper_findings: Findings):
    found = orders(paper_findings)
    # Three regimes on all problems and two in each stratum, two wordings, two milestones.
    assert len(found) == (3 + 2 * len(SMALL.strata)) * 2 * 2
    assert {(order.above_refsol, order.whole) for order in found} == {("yes", "yes")}
    assert found[0].stepalign_refsol.value == near(0.25)
    assert found[0].refsol_grpo.value == near(0.25)
    assert found[0].stepalign_grpo.value == near(0.5)


@pytest.mark.parametrize(
    ("stepalign_refsol", "refsol_grpo", "answer"),
    [(0.1, 0.1, "yes"), (-0.1, 0.1, "no"), (0.1, -0.1, "no"), (0.1, 0.0, "not separated")],
)
def test_the_whole_order_needs_both_differences(
    paper_findings: Findings, stepalign_refsol: float, refsol_grpo: float, answer: str
):
    assert paper_findings.main is not None

    def changed(gap: Gap) -> Gap:
        value = stepalign_refsol if gap.first.startswith("RefSol") else refsol_grpo
        return replace(gap, difference=Interval(value, value - 0.01, value + 0.01))

    main = replace(paper_findings.main, gaps=[changed(gap) for gap in paper_findings.main.gaps])
    found = orders(replace(paper_findings, main=main, difficulty=None))
    assert {order.whole for order in found} == {answer}
    assert {order.above_refsol for order in found} == {"yes" if stepalign_refsol > 0 else "no"}


def test_the_claims_by_token(paper_findings: Findings):
    claims = localisation_claims(paper_findings)
    # Three signs, and a share for each dialect and for another path.
    assert [claim.holds for claim in claims] == ["yes"] * (3 + 6 + 1)
    assert "4.00 [3.60, 4.40] times: 60.0 %" in claims[-1].measured
    assert "dialect 5" in claims[-2].text
    assert claims[-1].text.endswith("another path")
    alone = localisation_claims(replace(paper_findings, wording=None))
    assert [claim.holds for claim in alone] == ["yes"] * (3 + 3)
    assert alone[-2].text.endswith("RefSol, rare wording")


def test_a_study_that_is_not_finished_is_left_out(finished: Finished):
    output = finished(lambda name: 0.5)
    shutil.rmtree(output / "wording" / "tokens")
    (output / "rates" / "grpo-8x8" / "1e-04" / "result.json").unlink()
    findings = collect(output, SMALL)
    assert findings.wording is None
    assert findings.main is not None
    assert "GRPO, 8 x 8" not in {rates.label for rates in findings.rates}
    assert len(findings.rates) == 7


@pytest.mark.parametrize(
    ("intervals", "answer"),
    [
        ([(0.1, 0.2), (0.0, 0.3)], "not separated"),
        ([(0.1, 0.2), (0.1, 0.3)], "yes"),
        ([(0.1, 0.2), (-0.3, -0.1)], "no"),
        ([(-0.1, 0.2)], "not separated"),
        ([(0.1, 0.2), None], "not separated"),
    ],
)
def test_all_above(intervals: list[tuple[float, float] | None], answer: str):
    made = [None if i is None else Interval((i[0] + i[1]) / 2, *i) for i in intervals]
    assert all_above(made) == answer


def test_the_page_shows_every_plot_and_says_what_was_measured(
    paper_findings: Findings, tmp_path: Path
):
    findings = paper_findings
    where = environment(command="selfdistill reproduce", workers=2, seconds=findings.seconds)
    files = write_results(findings, SMALL, where, tmp_path / "results")
    page = (tmp_path / "results" / "README.md").read_text()
    assert "    selfdistill reproduce\n" in page
    assert "75.0 % [75.0, 75.0]" in page
    # One rollout a prompt stands beside two kinds of GRPO, but is compared with RefSol once.
    assert "20 comparisons (problems, rollouts, steps, wording): yes: 20, no: 0" in page
    assert "36 settings (with what is equal to GRPO): yes: 36, no: 0, not separated: 0." in page
    assert "## Built in by construction" in page
    assert f"torch {where.torch}" in page
    svgs = [path for path in files if path.suffix == ".svg"]
    assert len(svgs) == 6
    for path in svgs:
        assert f"({path.name})" in page
        ET.fromstring(path.read_text())
    data = json.loads((tmp_path / "results" / "results.json").read_text())
    assert len(data["orders"]) == 36
    assert data["scale"]["seeds"] == [0, 1, 2]
    assert data["environment"]["minutes"] == near(findings.jobs * 30 / 2 / 60)


def test_nothing_is_written_of_studies_that_did_not_run(tmp_path: Path):
    findings = collect(tmp_path / "nothing", SMALL)
    where = environment(command="selfdistill reproduce", workers=1, seconds=0.0)
    write_results(findings, SMALL, where, tmp_path / "results")
    page = (tmp_path / "results" / "README.md").read_text()
    assert "## The table" not in page
    assert "## Difficulty" not in page


def test_plots_put_values_where_they_belong():
    """Higher values lie higher, negative ones below the line of zero."""
    points = [(0.0, Interval(-0.1, -0.2, 0.0)), (10.0, Interval(0.3, 0.2, 0.4))]
    chart = ET.fromstring(
        line_plot("t", [Line("a", "#123456", points)], x_label="x", y_label="y", scale=100)
    )
    ns = {"svg": "http://www.w3.org/2000/svg"}
    circles = [
        (float(c.get("cx", "")), float(c.get("cy", "")))
        for c in chart.findall("svg:circle", ns)
        if c.get("r") == "4"
    ]
    assert circles[0][0] < circles[1][0]
    assert circles[0][1] > circles[1][1]
    labels = {t.text for t in chart.findall("svg:text", ns)}
    assert {"0", "40", "-20"} <= labels
    # Lines stand beside each other, unless their x is to be read exactly.
    for beside, places in ((True, 4), (False, 2)):
        lines = [Line(name, "#123456", points) for name in ("a", "b")]
        both = ET.fromstring(line_plot("t", lines, x_label="x", y_label="y", beside=beside))
        dots = [c for c in both.findall("svg:circle", ns) if c.get("r") == "4"]
        assert len({c.get("cx") for c in dots}) == places

    rows = [Dots("low", [Interval(1, 0, 2)]), Dots("high", [Interval(3, 2, 4)])]
    dots = ET.fromstring(dot_plot("t", rows, [("s", "#123456")], x_label="x"))
    first, second = (c for c in dots.findall("svg:circle", ns) if c.get("r") == "4.5")
    assert float(first.get("cx", "")) < float(second.get("cx", ""))
    assert float(first.get("cy", "")) < float(second.get("cy", ""))
