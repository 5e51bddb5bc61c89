from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from html_page import read
from typer.testing import CliRunner

from selfdistill.analysis.comparison import (
    NotARunError,
    RunCurve,
    compare,
    differing,
    flatten,
    labels,
    mean_curve,
    paired_difference,
    problem_scores,
    read_run_curve,
)
from selfdistill.analysis.report.comparison_tables import final_table
from selfdistill.cli import app
from selfdistill.evaluation.intervals import bootstrap
from selfdistill.evaluation.scores import Evaluation, ProblemScore

SAMPLES = 4


def evaluation(
    correct: list[int], *, split: str = "dev", tokens: float | None = 30.0, prefix: str = "p"
) -> Evaluation:
    """Every problem's attempts are `tokens` long, plus its place."""
    shares = [c / SAMPLES for c in correct]
    return Evaluation(
        split=split,
        samples=SAMPLES,
        pass_at_k=bootstrap([float(c > 0) for c in correct]),
        maj_at_k=bootstrap([float(c > 1) for c in correct]),
        avg_at_k=bootstrap(shares),
        strict_avg_at_k=bootstrap(shares),
        finished=1.0,
        mean_tokens=30.0 + (len(correct) - 1) / 2,
        problems=tuple(
            ProblemScore(f"{prefix}{i}", c, c, c > 1, None if tokens is None else tokens + i)
            for i, c in enumerate(correct)
        ),
    )


def config(
    *,
    name: str = "stepalign",
    group_size: int = 1,
    seed: int = 0,
    rate: float = 1e-4,
    model: str = "m",
) -> dict[str, object]:
    return {
        "model": model,
        "output_dir": f"runs/{name}{seed}",
        "method": {"name": name, "group_size": group_size},
        "optimizer": {"learning_rate": rate},
        "prompts_per_step": 8,
        "seed": seed,
    }


def run(
    name: str, settings: dict[str, object], correct: dict[int, list[int]], **options: object
) -> RunCurve:
    method = settings["method"]
    assert isinstance(method, dict)
    return RunCurve(
        name=name,
        config=flatten(settings),
        rollouts_per_step=8 * method["group_size"],
        steps=tuple(correct),
        evaluations=tuple(evaluation(c) for c in correct.values()),
        **options,
    )


@pytest.fixture
def runs() -> list[RunCurve]:
    """Return two seeds of StepAlignFB and one of GRPO, the second seed not finished."""
    return [
        run("a", config(), {0: [0, 1, 2, 1], 5: [2, 3, 2, 1], 10: [4, 4, 2, 2]}),
        run("b", config(seed=1), {0: [1, 1, 2, 0], 5: [4, 3, 2, 3]}),
        run("c", config(name="grpo", group_size=8), {0: [0, 1, 2, 1], 5: [1, 1, 2, 1]}),
    ]


def test_the_best_of_a_run_is_that_of_its_checkpoints() -> None:
    found = run("a", config(), {0: [4, 4], 5: [3, 3], 10: [2, 2]})
    assert found.best == 0
    graded = [
        replace(e, mean_reward=r) for e, r in zip(found.evaluations, (0.2, 0.7, 0.7), strict=True)
    ]
    assert replace(found, evaluations=tuple(graded)).best == 1


def test_seeds_of_one_configuration_are_one_curve(runs: list[RunCurve]) -> None:
    comparison = compare(runs)
    stepalign, grpo = comparison.groups
    assert [r.name for r in stepalign.runs] == ["a", "b"]
    assert (stepalign.label, grpo.label) == ("stepalign", "grpo")
    first, second = stepalign.curves["avg_at_k"]  # step 10 is missing in one seed
    assert (first.step, first.rollouts, first.value) == (0, 0, 0.25)
    assert (second.step, second.rollouts, second.value) == (5, 40, pytest.approx(20 / 32))
    assert second.low is not None
    assert second.high is not None
    assert second.low < 20 / 32 < second.high
    assert grpo.curves["avg_at_k"][1].rollouts == 320
    assert stepalign.curves["pass_at_k"][0].value == pytest.approx(6 / 8)
    assert stepalign.curves["maj_at_k"][1].value == pytest.approx(7 / 8)
    assert stepalign.curves["mean_tokens"][0].value == pytest.approx(31.5)


def test_one_run_keeps_the_intervals_of_its_evaluations(runs: list[RunCurve]) -> None:
    for metric in ("avg_at_k", "maj_at_k", "pass_at_k"):
        for point, measured in zip(mean_curve([runs[0]], metric), runs[0].evaluations, strict=True):
            interval = getattr(measured, metric)
            assert (point.value, point.low, point.high) == pytest.approx(
                (interval.value, interval.low, interval.high)
            )


def test_lengths_that_were_not_recorded_have_no_interval() -> None:
    old = evaluation([1, 2], tokens=None)
    assert problem_scores([old], "mean_tokens") is None
    (point,) = mean_curve([RunCurve("old", {}, 8, (0,), (old,))], "mean_tokens")
    assert (point.value, point.low, point.high) == (30.5, None, None)


def test_runs_on_other_problems_are_no_seeds_of_one_group(runs: list[RunCurve]) -> None:
    other = RunCurve("d", runs[0].config, 8, (0,), (evaluation([1, 1], prefix="q"),))
    comparison = compare([*runs, other])
    assert [group.label for group in comparison.groups] == [
        "stepalign (1)",
        "grpo",
        "stepalign (2)",
    ]
    with pytest.raises(ValueError, match="same problems"):
        mean_curve([runs[0], other], "avg_at_k")
    with pytest.raises(ValueError, match="different names"):
        compare([runs[0], runs[0]])


def test_held_out_problems_decide_and_else_the_best_step_does(runs: list[RunCurve]) -> None:
    dev = compare(runs)
    assert [(f.split, f.seeds, f.samples) for f in dev.finals] == [("dev", 2, 4), ("dev", 1, 4)]
    # The best steps: 12 of 16 and 12 of 16 right.
    assert dev.finals[0].metrics["avg_at_k"].value == pytest.approx(12 / 16)  # type: ignore[union-attr]
    assert "optimistic" in final_table(dev.finals).note
    held_out = [evaluation(c * 20, split="test") for c in ([4, 4], [4, 2], [1, 1])]
    tested = compare(
        [
            RunCurve(r.name, r.config, r.rollouts_per_step, r.steps, r.evaluations, e)
            for r, e in zip(runs, held_out, strict=True)
        ]
    )
    assert [f.split for f in tested.finals] == ["test", "test"]
    assert tested.finals[0].metrics["avg_at_k"].value == pytest.approx(14 / 16)  # type: ignore[union-attr]
    (difference,) = tested.differences
    assert (difference.first, difference.second) == ("stepalign", "grpo")
    found = difference.metrics["avg_at_k"]
    assert found is not None
    assert found.value == pytest.approx(0.25 - 0.875)
    assert found.high < 0
    assert "optimistic" not in final_table(tested.finals).note


def test_groups_on_different_problems_have_no_difference(runs: list[RunCurve]) -> None:
    other = RunCurve(
        "d", flatten(config(name="refsol")), 8, (0,), (evaluation([1, 1], prefix="q"),)
    )
    first, second, third = compare([*runs, other]).groups
    assert paired_difference(first, third) is None
    assert paired_difference(first, second) is not None


def test_labels_say_what_tells_configurations_apart() -> None:
    found = labels(
        [
            flatten(config()),
            flatten(config(rate=3e-4)),
            flatten(config(name="grpo", rate=3e-4, seed=4)),
        ]
    )
    assert found == ["stepalign, learning_rate=0.0001", "stepalign, learning_rate=0.0003", "grpo"]
    assert labels([flatten(config()), flatten(config())]) == ["stepalign (1)", "stepalign (2)"]
    # Where the weights lay changes nothing of what was learned.
    assert differing([flatten(config()), {**flatten(config(seed=1)), "shard": True}]) == []


def write_run(folder: Path, settings: dict[str, object], correct: dict[int, list[int]]) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [
        {"step": step, "seconds": {"evaluate": 1.0}, **asdict(evaluation(c))}
        for step, c in correct.items()
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_command_writes_page_markdown_and_json(tmp_path: Path) -> None:
    curve = {0: [0, 1, 2, 1], 5: [2, 3, 2, 1]}
    last = {0: [0, 1, 2, 1]}
    folders = [
        write_run(tmp_path / "one", config(), curve),
        write_run(tmp_path / "two", config(seed=1), curve),
        write_run(tmp_path / "three", config(name="grpo", group_size=8, model="<grpo>"), last),
    ]
    held_out = evaluation([4, 3, 4, 1], split="test")
    for folder in folders[:2]:
        (folder / "held_out.json").write_text(held_out.to_json())
    (folders[2] / "held_out_after.json").write_text(
        json.dumps({"evaluation": asdict(held_out), "seconds": 3.0})
    )
    output = tmp_path / "comparison"
    result = CliRunner().invoke(app, ["compare", *map(str, folders), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "Final accuracy" in result.output

    document = json.loads((output / "compare.json").read_text())
    assert [group["label"] for group in document["groups"]] == ["stepalign", "grpo"]
    assert document["finals"][0]["metrics"]["avg_at_k"]["value"] == pytest.approx(12 / 16)
    assert document["settings"]["method.group_size"] == {"stepalign": 1, "grpo": 8}
    assert document["settings"]["model"] == {"stepalign": "m", "grpo": "<grpo>"}
    markdown = (output / "compare.md").read_text()
    assert "| stepalign | test, 4 x 4 | 2 | 75.0 % [" in markdown
    assert "| grpo minus stepalign | test | +0.0 [-" in markdown

    page = read(output / "compare.html")
    assert page.sections == ["curves", "result", "differences", "reproduction"]
    assert not page.tags & {"script", "link", "img", "grpo"}
    assert page.links == []
    text = page.within().replace("\N{NO-BREAK SPACE}", " ")
    assert "3 runs in 2 groups" in text
    value = document["groups"][0]["curves"]["avg_at_k"][1]
    shown = " ".join(f"{100 * value[key]:.3g}" for key in ("value", "low", "high")).split()
    label = f"{shown[0]} [{shown[1]}, {shown[2]}] right answers (%)"
    assert f"training steps 5: {label}" in text
    assert f"rollouts learned from 40: {label}" in text
    assert "stepalign, seed 1" in text
    # Four charts over steps and the same four over rollouts; one of the two is hidden.
    html = (output / "compare.html").read_text()
    assert html.count("<svg") == 8
    assert re.search(r"#axis-steps:checked ~ \.by-rollouts[^{]*{ display: none; }", html)


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotARunError, match=re.escape(str(tmp_path))):
        read_run_curve(tmp_path)
