from __future__ import annotations

import html
import io
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from html_page import read
from rich.console import Console
from token_records import make_record

import studies.arithmetic.demo.run
from selfdistill.analysis.alignment import clear_examples, spread
from selfdistill.analysis.localisation import localise
from selfdistill.analysis.tokens import TokenAnalysis
from selfdistill.config import Config, save_config
from selfdistill.evaluation.intervals import bootstrap
from selfdistill.evaluation.scores import Evaluation, ProblemScore
from selfdistill.runlog import JsonLines
from selfdistill.training.metrics import StepMetrics
from studies.arithmetic.demo.difference import avg_difference
from studies.arithmetic.demo.page import write_report
from studies.arithmetic.demo.run import demo

SECTIONS = ["result", "examples", "curves", "costs", "reproduction"]


def make_evaluation(correct: list[int], *, samples: int = 4, split: str = "test") -> Evaluation:
    shares = [c / samples for c in correct]
    return Evaluation(
        split=split,
        samples=samples,
        pass_at_k=bootstrap([float(c > 0) for c in correct]),
        maj_at_k=bootstrap([float(c > 1) for c in correct]),
        avg_at_k=bootstrap(shares),
        strict_avg_at_k=bootstrap([0.9 * share for share in shares]),
        finished=1.0,
        mean_tokens=30.0,
        problems=tuple(ProblemScore(f"p{i}", c, c, c > 1) for i, c in enumerate(correct)),
    )


def write_stage(run: Path, name: str, correct: list[int], records: list[TokenAnalysis]) -> None:
    held_out = {"evaluation": asdict(make_evaluation(correct)), "seconds": 30.0}
    analysis = {
        "localisation": asdict(localise(records)),
        "attempts": [asdict(record) for record in records],
    }
    (run / f"held_out_{name}.json").write_text(json.dumps(held_out))
    (run / f"analysis_{name}.json").write_text(json.dumps(analysis))


def write_training(run: Path, *, steps: int) -> None:
    save_config(Config(model="some/solver", output_dir=run, seed=17, steps=3), run / "config.yaml")
    metrics = [
        StepMetrics(
            step=step,
            loss=0.2 / step,
            kl=0.2 / step,
            advantage=-0.01,
            entropy=0.1,
            active=1.0,
            taught=True,
            reward=0.25 * step,
            undecided=0,
            tied=0.5,
            dropped=0,
            too_long=0,
            unusable={},
            engine_disagreement=None,
            contexts={"critique": 16},
            grad_norm=0.5,
            learning_rate=1e-4,
            tokens=100,
            packed_tokens=300,
            unshared_tokens=400,
            seconds={"rollout": 2.0, "score": 4.0},
            peak_rss_mib=1000.0 + step,
        )
        for step in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(asdict(m)) + "\n" for m in metrics))
    lines = [
        {
            "step": step,
            "seconds": {"evaluate": 6.0},
            **asdict(make_evaluation([step, 1, 2], split="dev")),
        }
        for step in (0, steps)
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Return a finished run of three steps."""
    write_stage(tmp_path, "before", [0, 1, 2, 1], [make_record()])
    write_training(tmp_path, steps=3)
    write_stage(tmp_path, "after", [3, 3, 2, 4], [make_record()])
    (tmp_path / "summary.json").write_text(json.dumps({"best_step": 3, "peak_rss_mib": 2048.0}))
    return tmp_path


def test_a_finished_run_has_every_section_in_order(finished: Path) -> None:
    path = write_report(finished)
    assert path == finished / "report.html"
    page = read(path)
    assert page.sections == SECTIONS
    text = page.within()
    assert "Not measured yet" not in text
    assert "Built in by construction" in text
    for axis in ("training step", "nats per token", "right answers (%)"):
        assert axis in text


def test_the_page_needs_nothing_from_elsewhere(finished: Path) -> None:
    path = write_report(finished)
    page = read(path)
    assert page.links == []
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"url\(|@import|https?:", path.read_text("utf-8"))


def test_the_numbers_are_those_of_the_files(finished: Path) -> None:
    page = read(write_report(finished)).within()
    text = page.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")
    before, after = make_evaluation([0, 1, 2, 1]), make_evaluation([3, 3, 2, 4])
    assert "Avg@4 on 4 held-out problems: 25.0 % → 75.0 % +50.0 points (95 % interval" in text
    rise = avg_difference(before, after)
    assert f"(95 % interval {100 * rise.low:+.1f} to {100 * rise.high:+.1f})" in text
    for evaluation in (before, after):
        for metric in ("avg_at_k", "maj_at_k", "pass_at_k", "strict_avg_at_k"):
            interval = getattr(evaluation, metric)
            low, high = 100 * interval.low, 100 * interval.high
            assert f"{100 * interval.value:.1f} % [{low:.1f}, {high:.1f}]" in text
    assert "after step 3" in text
    # Three steps of 6 s, the first dev evaluation (6 s) and twice 30 s on the held-out problems.
    assert "1.4 min" in text
    assert "60.0 s (71.4 %)" in text
    assert "2.00 GiB" in text
    assert "900 instead of 1,200: 25.0 % saved by prefix sharing" in text
    assert "17, " in text
    assert "seed: 17" in text
    assert "Right answers to this question: 1 of 4 attempts before training, 3 of 4 after" in text
    localisation = localise([make_record()])
    assert localisation.mean_at is not None
    assert f"{localisation.mean_at.value:+.3f}" in text
    assert "training step 2: 0.1 nats per token" in text.replace("\n", " ")
    for line in (finished / "evaluations.jsonl").read_text().splitlines():
        dev = json.loads(line)
        value, low, high = (100 * dev["avg_at_k"][key] for key in ("value", "low", "high"))
        shown = f"training step {dev['step']}: {value:.3g} [{low:.3g}, {high:.3g}]"
        assert shown in text


def test_the_first_wrong_step_and_what_the_critique_made_of_it_stand_out(finished: Path) -> None:
    write_stage(finished, "after", [3, 3, 2, 4], [])
    path = write_report(finished)
    page = read(path)
    assert page.within("wrong", "flag") == "first error"
    assert page.within("wrong", "attempt") == "<step_2>34plus8makes3-3.22"
    assert page.within("wrong", "critique") == "<step_2> 34 plus 8 makes 42rewritten"
    assert page.within("heat", "copied") == "<step_1> 25 plus 9 makes 34copied"
    changed = re.findall("<mark>(.*?)</mark>", path.read_text("utf-8"))
    assert changed == ["42", "42"]  # in the wrong step, and in the answer
    verdict = page.within("verdict").replace("\N{NO-BREAK SPACE}", " ")
    assert "wrote 34 plus 8 makes 32, the critique 34 plus 8 makes 42" in verdict
    assert "64.0 % for the student, 2.5 % for the teacher" in verdict


def test_a_step_that_was_left_out_is_called_missing(finished: Path) -> None:
    record = make_record(
        tokens=["<step_2>", "3", "4", "<answer>", "3", "4"],
        response="<step_2> 34 <answer> 34",
        context="<step_1> 33 <step_2> 42 <answer> 42",
        wrong_tokens=(0, 3),
        first_wrong_step=1,
        advantage=[-1.0, 0, 0, 0, 0, 0],
    )
    write_stage(finished, "before", [0, 1, 2, 1], [record])
    write_stage(finished, "after", [3, 3, 2, 4], [])
    page = read(write_report(finished))
    assert page.within("note") == "missing"
    assert page.within("wrong", "attempt") == "<step_2>-1.034"
    assert page.within("verdict").startswith("The student left out 33. Chance of token")


def test_a_cell_is_coloured_by_the_advantage_and_tells_the_rest(finished: Path) -> None:
    cells = re.findall(
        r'<span class="t ([^"]*)" style="--a:([\d.]+)" title="([^"]*)">',
        (write_report(finished).read_text("utf-8")),
    )
    record = make_record()
    cells = cells[: len(record.tokens)]
    assert cells[14][0].split() == ["neg", "strong"]
    assert cells[14][1] == "1.00"
    assert cells[1][:2] == ("pos", "0.35")
    assert cells[2][0].split() == ["pos", "glued"]  # 2 and 5 are one number
    told = html.unescape(cells[14][2]).replace("\N{NO-BREAK SPACE}", " ")
    assert told == (
        "3\nadvantage -3.250 nats\nstudent 64.0 %, teacher 2.5 %\nKL 0.014 nats\nentropy 0.100 nats"
    )


def test_text_of_models_is_escaped(finished: Path) -> None:
    nasty = '<script>alert(1)</script>"&'
    record = make_record()
    record = replace(
        record,
        question=nasty,
        answer=nasty,
        tokens=[*record.tokens[:14], nasty, *record.tokens[15:]],
        response=f"{record.response} {nasty}",
        context=f"{record.context} {nasty}",
    )
    for name in ("before", "after"):
        write_stage(finished, name, [0, 1, 2, 1], [record])
    path = write_report(finished)
    page = read(path)
    assert "script" not in page.tags
    assert page.within("heat").count(nasty) >= 4  # token and critique, before and after
    assert f'title="{html.escape(nasty)}&#10;' in path.read_text("utf-8")


@pytest.mark.parametrize("stage", ["nothing", "held out", "training", "trained"])
def test_an_interrupted_run_shows_what_exists(tmp_path: Path, stage: str) -> None:
    if stage != "nothing":
        write_stage(tmp_path, "before", [0, 1, 2, 1], [make_record()])
    if stage in ("training", "trained"):
        write_training(tmp_path, steps=2 if stage == "training" else 3)
    if stage == "training":
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "lo')  # torn by a kill
    page = read(write_report(tmp_path))
    assert page.sections == SECTIONS
    text = page.within().replace("\N{NO-BREAK SPACE}", " ")
    assert ("25.0 % before training" in text) == (stage != "nothing")
    assert ("first error" in text) == (stage != "nothing")
    if stage == "training":
        assert "2 of 3 training steps are done" in text
        assert "600 instead of 800" in text
    if stage == "trained":
        assert "3 of 3 training steps are done" in text


def test_grpo_shows_what_it_has(tmp_path: Path) -> None:
    write_training(tmp_path, steps=3)
    method = {"name": "grpo"}
    save_config(
        Config.model_validate({"model": "m", "output_dir": tmp_path, "method": method}),
        tmp_path / "config.yaml",
    )
    log = JsonLines(tmp_path / "metrics.jsonl")
    without = [{**line, "kl": None} for line in log.read()]
    log.path.write_text("".join(json.dumps(line) + "\n" for line in without))
    page = write_report(tmp_path).read_text("utf-8")
    assert "GRPO has no teacher" in page
    assert "Divergence" not in page
    assert "not trained on" not in page
    assert "nothing to compare" in page


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        write_report(tmp_path / "none")


def test_examples_have_a_right_step_first_and_go_from_sharp_to_faint(finished: Path) -> None:
    def with_lowest(value: float) -> TokenAnalysis:
        return make_record(advantage=[value if i == 14 else 0.0 for i in range(20)])

    records = [with_lowest(-value) for value in (3, 1, 4, 2, 5, 0.5, 6)]
    at_once = make_record(wrong_tokens=(0, 8))
    skipped = make_record(context="<step_1> 34 <step_3> 3 <step_2> 42 <answer> 42")
    right = make_record(wrong_tokens=None)
    attempts = [right, at_once, skipped, *records]
    clear = clear_examples(attempts)
    assert [min(record.advantage) for record in clear] == [-6, -5, -4, -3, -2, -1, -0.5]
    assert spread(clear, count=3) == [clear[0], clear[3], clear[6]]
    assert spread(clear, count=9) == clear
    write_stage(finished, "before", [0, 1, 2, 1], attempts)
    text = read(write_report(finished)).within()
    assert "10 wrong held-out attempts were analysed" in text
    assert "Shown: 5 of the 7 whose first error follows a right step" in text
    write_stage(finished, "before", [0, 1, 2, 1], [at_once])
    assert "Shown: 1 of them" in read(write_report(finished)).within()


def test_the_demo_ends_in_this_page(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies.arithmetic.demo.run, "HELD_OUT_PROBLEMS", 4)
    monkeypatch.setattr(studies.arithmetic.demo.run, "HELD_OUT_SAMPLES", 3)
    config = Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": tmp_path / "demo",
            "device": "cpu",
            "steps": 2,
            "prompts_per_step": 2,
            "task": {"step_counts": [1, 2]},
            "method": {"name": "stepalign", "group_size": 2},
            "rollout": {"max_new_tokens": 12},
            "evaluation": {"every": 1, "problems": 2, "samples": 2},
        }
    )
    summary = demo(config, console=Console(file=io.StringIO()))
    assert summary is not None
    page = read(tmp_path / "demo" / "report.html")
    assert page.sections == SECTIONS
    text = page.within().replace("\N{NO-BREAK SPACE}", " ")
    assert "Not measured yet" not in text
    assert f"{100 * summary.tokens_saved:.1f} % saved by prefix sharing" in text
    assert f"{summary.minutes:.1f} min" in text
    assert f"{summary.peak_rss_mib / 1024:.2f} GiB" in text
    assert f"after step {summary.best_step}" in text
    assert "first error" in text
