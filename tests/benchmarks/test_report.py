from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks.checks import Errors
from benchmarks.memory import MEBIBYTE
from benchmarks.report import (
    Entry,
    Overhead,
    ProblemResult,
    Results,
    WorkspacePoint,
    print_table,
    problem_table,
)
from benchmarks.timing import Timing


def entry(key, seconds, *, floor="floor", over=1.0, **options):
    options = {"errors": Errors(1e-7, 2e-6, 3e-6)} | options
    return Entry(key, f"label of {key}", floor, Timing([seconds] * 3), over, over, **options)


@pytest.fixture
def results():
    nothing = Errors(None, None, None)
    entries = [
        entry("floor", 0.5, errors=nothing),
        entry("ours", 0.55, over=1.1, speedup=2.0, peak_extra_bytes=96 * MEBIBYTE, plan="store: a"),
        entry("ours_rho_0.2", 0.3, over=0.6, plan="store: a"),
        entry("torch", 1.1, over=2.2, speedup=1.0),
        entry("floor_frozen", 0.4, floor="floor_frozen", errors=nothing),
        entry("ours_frozen", 0.44, floor="floor_frozen", over=1.1, errors=Errors(1e-7, 2e-6, None)),
    ]
    point = WorkspacePoint(
        "8/8/8", "float32", 64 * MEBIBYTE, "recompute", 60 * MEBIBYTE, "recompute: b",
        Timing([1.0]), 1.25, 1.24,
    )  # fmt: skip
    auto = WorkspacePoint(
        "8/8/8", "float32", "auto", "store", 256 * MEBIBYTE, "store: c", Timing([1.0]), 1.1, 1.1
    )
    return Results(
        {"device": "a processor", "threads": 2},
        {"rounds": 3},
        [ProblemResult("8/8/8", dtype, entries) for dtype in ("float32", "bfloat16")],
        [point, auto],
        [Overhead("8/64/512", "float32", Timing([3e-4]), Timing([2e-4]))],
    )


def test_table_of_a_problem(results):
    body = {cells[0]: cells[1:] for cells in problem_table(results.problems[0]).body}
    assert body["label of ours"] == ("0.55", "0%", "1.10", "1.10", "2.00x", "96")
    assert body["label of ours_rho_0.2"] == ("0.3", "0%", "0.60", "0.60", "", "")


def test_markdown_holds_every_table(results):
    text = results.markdown()
    assert "- threads: 2\n" in text
    assert "### reverse_kl, N/H/V 8/8/8, float32\n" in text
    assert "| label of torch | 1.1 | 0% | 2.20 | 2.20 | 1.00x |  |" in text
    assert text.count("- label of ours: store: a") == 2  # once a problem, not once an entry
    assert "| float32 | 64 | 60 | recompute | 1 | 1.25 | 1.24 |" in text
    assert "| float32 | auto | 256 | store | 1 | 1.10 | 1.10 |" in text
    assert "| float32 | 300 | 200 | 1.50 |" in text
    assert "| label of ours_frozen | 1e-07 | 2e-06 | - |" in text
    assert "| label of floor | -" not in text


def test_files(results, tmp_path):
    written = results.write(tmp_path / "new")
    names = ["results.json", "table.md", "time_over_floor.png", "time_over_workspace.png"]
    assert [path.name for path in written] == names
    record = json.loads(written[0].read_text())
    assert record["problems"][0]["entries"][1]["timing"]["seconds"] == [0.55] * 3
    assert record["workspaces"][0]["plan"] == "recompute: b"
    for plot in written[2:]:
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert plot.stat().st_size > 10_000


def test_no_plot_without_results(tmp_path):
    written = Results({}, {}).write(tmp_path)
    assert [path.name for path in written] == ["results.json", "table.md"]


def test_a_terminal_of_80_columns_shows_every_cell(results):
    console = Console(width=80, record=True, file=io.StringIO())
    print_table(console, problem_table(results.problems[0]))
    shown = console.export_text()
    for cells in problem_table(results.problems[0]).body:
        for cell in cells:
            assert cell in shown


def test_predictions_stand_beside_what_was_measured(results):
    (first, *others) = results.problems[0].entries
    measured = replace(
        results.problems[0],
        entries=[replace(first, predicted=0.0421), *others],
        failures={"trl": "trl is not installed"},
    )
    table = problem_table(measured)
    assert table.head[-1] == "predicted"
    assert [line[-1] for line in table.body][:2] == ["0.0421", ""]
    text = replace(results, problems=[measured]).markdown()
    assert "- without trl: trl is not installed\n" in text
    assert "predicted" not in problem_table(results.problems[0]).head


def test_a_terminal_of_80_columns_shows_predictions_too(results):
    entries = [
        replace(one, label="selfdistill, frozen, rho 0.05", timing=Timing([0.0565]), predicted=0.04)
        for one in results.problems[0].entries
    ]
    console = Console(width=80, record=True, file=io.StringIO())
    table = problem_table(replace(results.problems[0], entries=entries))
    print_table(console, table)
    shown = console.export_text()
    for cells in table.body:
        for cell in cells:
            assert cell in shown


def test_each_objective_has_tables_of_its_own(results):
    other = replace(results.problems[0], objective="cross_entropy")
    text = replace(results, problems=[results.problems[0], other]).markdown()
    assert "### cross_entropy, N/H/V 8/8/8, float32\n" in text
    assert "### Errors against float64, cross_entropy, float32\n" in text
