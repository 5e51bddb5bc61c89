"""The demo: evaluate the shipped solver, let it improve itself, evaluate again, write the report.

Every stage leaves a file in the run's folder and is skipped when that file is there, so an
interrupted demo goes on where it was.

    held_out_before.json    accuracy on the test split before training
    analysis_before.json    per-token advantage of wrong attempts
    metrics.jsonl ...       the training run (selfdistill.training.loop)
    held_out_after.json     the same test problems, best checkpoint by the dev split
    analysis_after.json
    summary.json            what the table shows
    report.html
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from selfdistill.analysis.localisation import localise
from selfdistill.analysis.tokens import analyze, erroneous_attempts
from selfdistill.config import Config
from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.scores import Evaluation, summarize
from selfdistill.evaluation.tables import evaluation_table, percent
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.teacher import build_teacher
from selfdistill.places import alone_in
from selfdistill.progress import progress_bars
from selfdistill.runlog import JsonLines, peak_rss_mib, write_atomically
from selfdistill.seeds import derive_seed
from selfdistill.training.checkpoint import CheckpointStore
from selfdistill.training.loop import train
from selfdistill.training.run_folder import RunExistsError
from selfdistill.training.solver import Solver, load_solver
from selfdistill.training.state_file import read_state
from selfdistill.visible import say
from studies.arithmetic.demo.difference import avg_difference
from studies.arithmetic.demo.page import write_report

HELD_OUT_PROBLEMS = 200
HELD_OUT_SAMPLES = 12
ANALYSED_ATTEMPTS = 100
# Everything that a demo writes; what `fresh` removes, and nothing else.
ARTIFACTS = (
    "held_out_before.json",
    "analysis_before.json",
    "config.yaml",
    "metrics.jsonl",
    "evaluations.jsonl",
    "completions",
    "checkpoints",
    "held_out_after.json",
    "analysis_after.json",
    "summary.json",
    "report.html",
)


@dataclass(frozen=True)
class HeldOut:
    """Accuracy on the test split, and the seconds that it took to measure."""

    evaluation: Evaluation
    seconds: float


@dataclass(frozen=True)
class Summary:
    """What the demo shows in the end.

    Attributes:
        config: the run's configuration.
        before, after: accuracy on the same held-out problems.
        difference: of Avg@k, paired by problem.
        best_step: the step whose weights were evaluated, chosen on the dev split.
        tokens_saved: share of the tokens that prefix sharing kept from being read, 0 to 1.
        minutes: working time of all stages, interruptions left out.
        peak_rss_mib: highest resident memory.
    """

    config: dict[str, Any]
    before: Evaluation
    after: Evaluation
    difference: Interval
    best_step: int
    tokens_saved: float
    minutes: float
    peak_rss_mib: float


def demo(config: Config, *, fresh: bool = False, console: Console | None = None) -> Summary | None:
    """Run what is left of the demo and print its table.

    Args:
        config: the run; `config.output_dir` holds what is already done.
        fresh: remove what an earlier demo wrote there, and start over.
        console: where progress and the table go; the standard output by default.

    Returns:
        The summary, or None when an interrupt stopped the training.

    Raises:
        RunExistsError: the folder holds a finished demo of another configuration, or a run that
            is no demo.
        PlaceTakenError: another process works in the folder.
    """
    transformers_logging.disable_progress_bar()
    with alone_in(config.output_dir):
        return _demo(config, fresh=fresh, console=console or Console())


def _demo(config: Config, *, fresh: bool, console: Console) -> Summary | None:
    run = config.output_dir
    if fresh:
        remove_artifacts(run)
    if (run / "summary.json").exists():
        summary = TypeAdapter(Summary).validate_json((run / "summary.json").read_text("utf-8"))
        if summary.config != config.model_dump(mode="json"):
            raise RunExistsError(
                f"{run} holds a finished demo of another configuration; start over with --fresh"
            )
        say(console, f"The demo in {run} is finished; --fresh starts over.")
    else:
        before = held_out("before", config, load_solver(config), console)
        result = train(config, resume=True, console=console)
        if result.interrupted:
            console.print(f"Stopped after step {result.step}; the same command goes on from there.")
            return None
        best = CheckpointStore(run / "checkpoints").best
        after = held_out("after", config, load_solver(config, best), console)
        summary = summarise(config, before, after)
        write_atomically(
            run / "summary.json", TypeAdapter(Summary).dump_json(summary, indent=1).decode()
        )
    if not (run / "report.html").exists():
        write_report(run)
    console.print(summary_table(summary))
    say(console, f"Report: {(run / 'report.html').resolve()}")
    return summary


def held_out(name: str, config: Config, solver: Solver, console: Console) -> HeldOut:
    """Measure accuracy on the test split and score wrong attempts token by token, once."""
    path = config.output_dir / f"held_out_{name}.json"
    if path.exists():
        return TypeAdapter(HeldOut).validate_json(path.read_text("utf-8"))
    start = time.perf_counter()
    with progress_bars(console) as bars:
        bar = bars.add_task(name, total=HELD_OUT_PROBLEMS, note="held-out problems")
        attempts = solver.attempt(
            split="test",
            problems=HELD_OUT_PROBLEMS,
            samples=HELD_OUT_SAMPLES,
            seed=derive_seed("held out"),
            progress=lambda count: bars.advance(bar, count),
        )
    evaluation = summarize(attempts, solver.task, split="test")
    base = load_solver(config).model
    teacher = build_teacher(config.method.teacher, solver.model, base=base)
    records = []
    if teacher is not None:  # GRPO has nobody who disagrees
        records = analyze(
            solver,
            teacher,
            solver.build_method(config.method),
            attempts,
            erroneous_attempts(attempts, limit=ANALYSED_ATTEMPTS, each=1, located=True),
            lm_heads=find_lm_heads(solver.model, teacher),
        )
    analysis = {
        "localisation": asdict(localise(records)),
        "attempts": [asdict(record) for record in records],
    }
    write_atomically(config.output_dir / f"analysis_{name}.json", json.dumps(analysis))
    result = HeldOut(evaluation, time.perf_counter() - start)
    write_atomically(path, TypeAdapter(HeldOut).dump_json(result).decode())
    return result


def summarise(config: Config, before: HeldOut, after: HeldOut) -> Summary:
    """Put the stages' figures together."""
    metrics = JsonLines(config.output_dir / "metrics.jsonl").read()
    evaluations = JsonLines(config.output_dir / "evaluations.jsonl").read()
    training = (
        sum(sum(line["seconds"].values()) for line in metrics)
        + evaluations[0]["seconds"]["evaluate"]
    )
    packed = sum(line["packed_tokens"] for line in metrics)
    unshared = sum(line["unshared_tokens"] for line in metrics)
    best_step = read_state(CheckpointStore(config.output_dir / "checkpoints").last).best_step
    assert best_step is not None  # training has evaluated at least once
    return Summary(
        config=config.model_dump(mode="json"),
        before=before.evaluation,
        after=after.evaluation,
        difference=avg_difference(before.evaluation, after.evaluation),
        best_step=best_step,
        tokens_saved=1 - packed / unshared,
        minutes=(before.seconds + training + after.seconds) / 60,
        peak_rss_mib=max(peak_rss_mib(), *(line["peak_rss_mib"] for line in metrics)),
    )


def summary_table(summary: Summary) -> Table:
    """Return the table that the demo ends with."""
    table = evaluation_table({"before": summary.before, "after": summary.after})
    table.add_section()
    for label, value in (
        (f"Avg@{summary.before.samples} rose by, points", percent(summary.difference, sign=True)),
        ("tokens saved by sharing", f"{summary.tokens_saved:.0%}"),
        ("minutes", f"{summary.minutes:.1f}"),
        ("peak memory", f"{summary.peak_rss_mib / 1024:.1f} GiB"),
    ):
        table.add_row(label, "", value)
    return table


def remove_artifacts(run: Path) -> None:
    """Remove what a demo wrote, and nothing else.

    Raises:
        RunExistsError: the folder holds a training run, but not what a demo writes first.
    """
    first, *others = (run / name for name in ARTIFACTS)
    if not first.exists() and any(path.exists() for path in others):
        raise RunExistsError(
            f"{run} holds a run that is no demo (it has no {first.name}), and --fresh would remove "
            "it: choose another --output"
        )
    for name in ARTIFACTS:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
