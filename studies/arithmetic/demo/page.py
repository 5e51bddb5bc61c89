"""The report's sections, one function each."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from selfdistill import __version__
from selfdistill.analysis.alignment import clear_examples, spread
from selfdistill.analysis.localisation import localisation_table
from selfdistill.analysis.report.charts import Series, bars, line_chart
from selfdistill.analysis.report.document import document, html_table
from selfdistill.analysis.report.heatmap import LEGEND, heat_map, verdict
from selfdistill.analysis.report.text import isolated
from selfdistill.analysis.tokens import TokenAnalysis
from selfdistill.evaluation.scores import Evaluation
from selfdistill.runlog import write_atomically
from studies.arithmetic.demo.files import Run, read_run

EXAMPLES = 5
TITLE = "Self-distillation report"
PHASES = {
    "rollout": "sampling attempts",
    "critique": "writing critiques",
    "context": "rendering prompts",
    "score": "scoring, loss, backward",
    "update": "clipping and AdamW",
    "evaluate": "evaluation, dev split",
    "held_out": "evaluation, held-out",
}
MISSING = '<p class="missing">Not measured yet.</p>'


def write_report(run_dir: Path) -> Path:
    """Write one self-contained HTML page about a run, finished or interrupted.

    Args:
        run_dir: the run's folder; sections whose files are missing say so.

    Returns:
        the page, `run_dir / "report.html"`.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run = read_run(run_dir)
    path = run_dir / "report.html"
    sections = (result, examples, curves, costs, reproduction)
    body = "".join(section(run) for section in sections)
    write_atomically(path, document(TITLE, body))
    return path


def result(run: Run) -> str:
    """The outcome in one sentence, the accuracy table and what the run took."""
    return (
        f'<header><h1>{headline(run)}</h1><p class="lead">{subtitle(run)}</p></header>'
        f'<section id="result" class="columns">{accuracy_table(run)}{facts(run)}</section>'
    )


def headline(run: Run) -> str:
    """Say what the run achieved, or how far it came."""
    before, after = run.before.evaluation, run.after.evaluation
    if before is None:
        return "Nothing measured on held-out problems yet"
    what = f"Avg@{before.samples} on {len(before.problems)} held-out problems"
    if after is None or run.rise is None:
        return f"{what}: {_percent(before.avg_at_k.value)} before training"
    rise, low, high = (
        _number(100 * share, "+.1f") for share in (run.rise.value, run.rise.low, run.rise.high)
    )
    return (
        f"{what}: {_percent(before.avg_at_k.value)} &rarr; {_percent(after.avg_at_k.value)} "
        f"<small>{rise} points (95&nbsp;% interval {low} to {high})</small>"
    )


def subtitle(run: Run) -> str:
    """Say what the numbers are."""
    if run.after.evaluation is None:
        steps = run.config.get("steps", "?")
        return f"Unfinished: {len(run.metrics)} of {steps} training steps are done."
    chosen = f" after step {run.summary['best_step']}" if run.summary else ""
    return (
        f"The same problems before and after training; the checkpoint{chosen} was chosen on other "
        "problems (dev split). Avg@k: mean share of right answers in k attempts."
    )


def accuracy_table(run: Run) -> str:
    """Pass@k, Maj@k, Avg@k and strict accuracy with their intervals."""
    stages = {"before": run.before.evaluation, "after": run.after.evaluation}
    evaluations = {name: e for name, e in stages.items() if e is not None}
    if not evaluations:
        return MISSING
    first = next(iter(evaluations.values()))
    k = first.samples
    rows = {
        f"Avg@{k}": "avg_at_k",
        f"Maj@{k}, most frequent answer": "maj_at_k",
        f"Pass@{k}, at least one right": "pass_at_k",
        f"Avg@{k}, {first.strict_means}": "strict_avg_at_k",
    }
    head = "".join(f"<th>{name} training</th>" for name in evaluations)
    body = "".join(
        f"<tr><th>{label}</th>{''.join(_interval(e, m) for e in evaluations.values())}</tr>"
        for label, m in rows.items()
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def facts(run: Run) -> str:
    """Time, memory, tokens, versions."""
    unshared, packed = run.token_counts
    rows = {}
    if run.phases:
        rows["working time"] = f"{sum(run.phases.values()) / 60:.1f} min"
    if run.peak_rss_mib is not None:
        rows["peak memory"] = f"{run.peak_rss_mib / 1024:.2f} GiB"
    if unshared:
        rows["tokens read"] = (
            f"{packed:,} instead of {unshared:,}: {_percent(1 - packed / unshared)} saved by "
            "prefix sharing"
        )
    rows["seed, threads"] = f"{run.config.get('seed', '?')}, {torch.get_num_threads()}"
    rows["software"] = ", ".join(
        [
            f"selfdistill {__version__}",
            *(f"{name} {version(name)}" for name in ("torch", "transformers")),
            f"Python {platform.python_version()}",
        ]
    )
    return f"<dl>{''.join(f'<dt>{k}</dt><dd>{isolated(v)}</dd>' for k, v in rows.items())}</dl>"


def examples(run: Run) -> str:
    """Attempts as heat maps beside their critiques, and how local the advantage is."""
    if not learns_from_a_teacher(run):
        return (
            '<section id="examples"><h2>What the model learned from</h2><p>GRPO has no teacher: '
            "the attempts at a question are rewarded for right answers and compared with each "
            "other, so there is no token-by-token judgement to show.</p></section>"
        )
    attempts = run.before.attempts
    clear = clear_examples(attempts)
    picked = spread(clear or attempts, count=EXAMPLES)
    cards = "".join(example(run, record) for record in picked)
    name = context_name(run)
    return (
        '<section id="examples"><h2>Where the model erred, and what the critique changed</h2>'
        f"<p>The student answered alone. Its teacher is the same model, shown the {name} as well: "
        "<b>red</b> tokens are those that it would now rather not write, <b>blue</b> ones those "
        "that it is surer of. Training moves the student towards this teacher.</p>"
        f"{LEGEND}{cards or MISSING}"
        f"{_selection(picked, clear, attempts)}{localisation(run)}</section>"
    )


def example(run: Run, record: TokenAnalysis) -> str:
    """One attempt before training, and what became of its question."""
    name = context_name(run)
    before, after = (stage.right_attempts(record.problem_id) for stage in (run.before, run.after))
    fate = ""
    if before is not None and run.before.evaluation:
        k = run.before.evaluation.samples
        fate = f"Right answers to this question: {before} of {k} attempts before training"
        fate += f", <b>{after} of {k} after</b>." if after is not None else "."
    later = next((a for a in run.after.attempts if a.problem_id == record.problem_id), None)
    again = (
        "<details><summary>An attempt at this question that still went wrong after training"
        f"</summary>{verdict(later)}{heat_map(later, context_name=name)}</details>"
        if later
        else ""
    )
    return (
        f"<article><h3>Question <code>{isolated(record.question)}</code>, right answer "
        f"<code>{isolated(record.answer)}</code></h3>{verdict(record)}"
        f'{heat_map(record, context_name=name)}<p class="about">{fate}</p>{again}</article>'
    )


def localisation(run: Run) -> str:
    """How the advantage lies around the first wrong step, before and after training."""
    stages = {"before training": run.before.localisation, "after training": run.after.localisation}
    found = {name: figures for name, figures in stages.items() if figures is not None}
    if not found:
        return ""
    return html_table(
        localisation_table(
            "How local the correction is",
            found,
            note="Each column looks at the wrong attempts of its own time, at most one a question.",
        )
    )


def curves(run: Run) -> str:
    """Accuracy, divergence and reward over the training steps."""
    accuracy = []
    if run.evaluations:
        first = run.evaluations[0]
        accuracy.append(
            Series(
                f"{first['split']}: Avg@{first['samples']}, {len(first['problems'])} problems",
                "one",
                [(line["step"], line["avg_at_k"]["value"]) for line in run.evaluations],
                [(line["avg_at_k"]["low"], line["avg_at_k"]["high"]) for line in run.evaluations],
            )
        )
    if run.before.evaluation is not None:
        k, count = run.before.evaluation.samples, len(run.before.evaluation.problems)
        measured = [(0, run.before.evaluation.avg_at_k)]
        if run.after.evaluation is not None and run.summary is not None:
            measured.append((run.summary["best_step"], run.after.evaluation.avg_at_k))
        accuracy.append(
            Series(
                f"held-out: Avg@{k}, {count} problems",
                "two",
                [(step, avg.value) for step, avg in measured],
                [(avg.low, avg.high) for _, avg in measured],
                joined=False,
                shift=7,
            )
        )
    has_teacher = learns_from_a_teacher(run)
    kl = [(line["step"], line["kl"]) for line in run.metrics if line["kl"] is not None]
    loss = [Series(f"KL({'teacher' if has_teacher else 'base model'}, student)", "one", kl)]
    if has_teacher and any(line["active"] < 1 for line in run.metrics):
        loss.append(
            Series(
                "loss, after the mask",
                "two",
                [(line["step"], line["loss"]) for line in run.metrics],
            )
        )
    reward = [
        Series(
            "right answers among the step's own attempts",
            "one",
            [(line["step"], line["reward"]) for line in run.metrics],
        )
    ]
    if not has_teacher:
        reward.append(
            Series(
                "questions whose attempts are all right or all wrong: nothing to compare",
                "two",
                [(line["step"], line["tied"]) for line in run.metrics],
            )
        )
    step = "training step"
    charts = [
        line_chart("Accuracy", accuracy, x_label=step, y_label="right answers (%)", percent=True),
        line_chart(
            "Reward" + (" (reported, not trained on)" if has_teacher else ""),
            reward,
            x_label=step,
            y_label="share (%)",
            percent=True,
        ),
    ]
    if has_teacher or kl:
        title = f"Divergence from the {'teacher' if has_teacher else 'base model'}"
        charts.insert(1, line_chart(title, loss, x_label=step, y_label="nats per token"))
    return (
        '<section id="curves"><h2>Over the training steps</h2>'
        "<p>Vertical bars are 95&nbsp;% intervals over problems. "
        "Hover over a point for its value.</p>"
        f'<div class="charts">{"".join(charts)}</div></section>'
    )


def costs(run: Run) -> str:
    """Time of each phase, and the tokens that sharing prefixes saved."""
    total = sum(run.phases.values())
    time = [
        (PHASES.get(phase, phase), seconds, f"{seconds:.1f} s ({_percent(seconds / total)})")
        for phase, seconds in sorted(run.phases.items(), key=lambda item: -item[1])
    ]
    unshared, packed = run.token_counts
    tokens = [
        ("each prompt for each attempt", float(unshared), f"{unshared:,}"),
        ("shared prefixes once", float(packed), f"{packed:,}"),
    ]
    saved = (
        f"<p>{_percent(1 - packed / unshared)} saved while training. The gain grows with long "
        "prompts and short responses, and shrinks the other way round.</p>"
        if unshared
        else ""
    )
    return (
        '<section id="costs"><h2>What it took</h2><h3>Working time</h3>'
        f"{bars(time) if time else MISSING}"
        "<h3>Tokens read by student and teacher</h3>"
        f"{saved + bars(tokens, style='two') if unshared else MISSING}</section>"
    )


def reproduction(run: Run) -> str:
    """The command, the configuration, and what is built in by construction."""
    config = f"<pre>{isolated(run.config_yaml)}</pre>" if run.config_yaml else MISSING
    return (
        '<section id="reproduction"><h2>How to reproduce it</h2>'
        "<p>In a clone of the repository: <code>make demo</code>, or "
        "<code>selfdistill demo --output FOLDER</code> once it is installed; "
        "<code>selfdistill train FILE</code> trains with the configuration below. The same "
        "configuration on the same machine gives the same numbers.</p>"
        "<p><b>Built in by construction.</b> The task is synthetic: chains of additions or of "
        "subtractions modulo 100. A program sets them, checks them and, as the critic, corrects "
        "them without ever erring. The solver is a small model, pretrained on generated text to "
        "have what the method needs: it forgets carries at chosen rates, it copies a critique or a "
        "reference solution that it is shown, and it goes on from its own state when it has left "
        "them. That the teacher finds the error is therefore to be expected. Not built in: "
        "training saw no held-out question, and right answers only through the critiques, so the "
        "rise in accuracy without a critique is what self-distillation taught. See "
        "<code>examples/arithmetic/README.md</code>.</p>"
        f"<details open><summary>Configuration</summary>{config}</details></section>"
    )


def context_name(run: Run) -> str:
    """Name what the teacher sees beside the question."""
    names = {
        "refsol": "reference solution",
        "peer": "peer's solution",
        "environment": "checker's feedback",
    }
    return names.get(run.config.get("method", {}).get("name"), "critique")


def learns_from_a_teacher(run: Run) -> bool:
    """Tell whether the run's method has a self-teacher; GRPO has none."""
    return run.config.get("method", {}).get("name") != "grpo"


def _selection(
    picked: Sequence[TokenAnalysis],
    clear: Sequence[TokenAnalysis],
    attempts: Sequence[TokenAnalysis],
) -> str:
    if not picked:
        return ""
    chosen = (
        f"{len(picked)} of the {len(clear)} whose first error follows a right step, evenly from "
        "the one that the teacher disputes most sharply to the one that it disputes least"
        if clear
        else f"{len(picked)} of them"
    )
    return (
        f'<p class="about">{len(attempts)} wrong held-out attempts were analysed before training. '
        f"Shown: {chosen}.</p>"
    )


def _interval(evaluation: Evaluation, metric: str) -> str:
    interval = getattr(evaluation, metric)
    return (
        f"<td>{_percent(interval.value)} <i>[{100 * interval.low:.1f}, "
        f"{100 * interval.high:.1f}]</i></td>"
    )


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "&ndash;"
    return format(value, form).replace("-", "&minus;").replace("%", "&nbsp;%")


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"
