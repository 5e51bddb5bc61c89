"""`selfdistill analyze`: what the teacher's context does to the advantage, over many attempts.

The run's own solver (of a chosen checkpoint) attempts problems of a split. The same attempts are
then scored by each method that was asked for: the method decides what the teacher sees, while
teacher weights, loss and attempts stay the same, so that only the context differs. Written are

    analysis.json    every figure with its interval
    analysis.md      the tables
    analysis.html    the tables, charts, and some attempts as heat maps
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from transformers.utils import logging as transformers_logging

from selfdistill.analysis import Place, TokenAnalysis, analyze, erroneous_attempts
from selfdistill.checkpoint import CheckpointStore, read_checkpoint
from selfdistill.compare import flatten
from selfdistill.config import Config, ConfigError, MethodConfig, load_config
from selfdistill.evaluate import Attempts, Interval, bootstrap, sample_attempts
from selfdistill.localisation import (
    GEMMS,
    KEPT,
    NEGATIVE,
    Localisation,
    MaskEffect,
    Overall,
    ProfilePoint,
    first_step_wrong,
    localisation_table,
    localise,
    mask_effects,
    overall,
    profile,
    suggest,
)
from selfdistill.methods import build_method
from selfdistill.methods.loss import lm_head
from selfdistill.progress import progress_bars
from selfdistill.rollout import SamplingParams
from selfdistill.runlog import write_atomically
from selfdistill.solver import Solver, load_solver
from selfdistill.tables import MISSING, TextTable, number, percent
from selfdistill.train import build_teacher, derive_seed

Checkpoint = Literal["best", "last", "base"]

# Attempts drawn and judged at once.
PORTION = 16
EXAMPLES = 4


@dataclass(frozen=True)
class MethodAnalysis:
    """One method's figures; the attempts are the same for all methods.

    Attributes:
        label: short, and unique within the analysis.
        settings: the method's configuration section.
        all_wrong: attempts with a wrong step.
        first_wrong: those whose first step is the wrong one: nothing right comes before it.
        later_wrong: those whose first error follows a right step.
        wrong: all attempts that went wrong, whether their steps are known or not.
        right: attempts with the right answer and no wrong step.
        profile: mean advantage by distance from the start of the wrong step, over `later_wrong`.
        masks: over attempts as they come, right and wrong ones, as training sees them.
        suggested: the mask with the fewest tokens that keeps 90 % of the sum of |A|, or None.
    """

    label: str
    settings: dict[str, Any]
    all_wrong: Localisation
    first_wrong: Localisation
    later_wrong: Localisation
    wrong: Overall
    right: Overall
    profile: tuple[ProfilePoint, ...]
    masks: tuple[MaskEffect, ...]
    suggested: MaskEffect | None


@dataclass(frozen=True)
class Example:
    """One attempt as every method's teacher sees it: a record for each method, in their order."""

    records: tuple[TokenAnalysis, ...]


@dataclass(frozen=True)
class RunAnalysis:
    """Everything that is written.

    Attributes:
        run: the run's folder.
        checkpoint: whose weights wrote the attempts; `step` says after how many steps.
        step: optimiser steps behind these weights.
        split: which problems.
        task: its name.
        problems, rollouts: how many were drawn.
        wrong: attempts that went wrong and were scored.
        as_they_come: attempts that were scored as drawn, right or wrong.
        solved: share of the drawn attempts with the right answer.
        knows_steps: whether the task's checker marked a wrong step in any attempt.
        methods: figures of each method.
        examples: attempts to show.
        seconds: wall time.
    """

    run: str
    checkpoint: Checkpoint
    step: int
    split: str
    task: str
    problems: int
    rollouts: int
    wrong: int
    as_they_come: int
    solved: Interval
    knows_steps: bool
    methods: tuple[MethodAnalysis, ...]
    examples: tuple[Example, ...]
    seconds: float


@dataclass(frozen=True)
class Draw:
    """Attempts and which of them to look at.

    Attributes:
        attempts: whole groups.
        wrong: places of those that went wrong.
        as_they_come: places of the first ones drawn, whatever became of them.
    """

    attempts: list[Attempts]
    wrong: list[Place]
    as_they_come: list[Place]

    @property
    def chosen(self) -> list[Place]:
        """Each place once, in the order of drawing."""
        return sorted({*self.wrong, *self.as_they_come})


def analyze_run(
    run: Path,
    *,
    checkpoint: Checkpoint = "best",
    methods: str | None = None,
    attempts: int = 500,
    problems: int = 500,
    samples: int | None = None,
    split: str = "test",
    seed: int = 0,
    console: Console | None = None,
) -> RunAnalysis:
    """Draw attempts from a run's solver and score them by one or more methods.

    Args:
        run: the folder of a training run.
        checkpoint: whose weights write the attempts; "base": those before training.
        methods: see `parse_methods`; None: the run's own method.
        attempts: how many that went wrong to look at; fewer, where the problems give no more.
        problems: how many problems of the split to draw from, at most.
        samples: attempts at each problem; None: the methods' group size.
        split: "dev" or "test".
        seed: of the sampled tokens.
        console: where progress is shown; the standard error stream by default.

    Raises:
        CheckpointError: there is no such checkpoint, or it is torn.
        ConfigError: `methods` asks for something that does not exist, or a method has no teacher.
        OSError: the run has no config.yaml.
    """
    start = time.perf_counter()
    transformers_logging.disable_progress_bar()
    console = console or Console(stderr=True)
    config = load_config(run / "config.yaml")
    sections = parse_methods(methods, config)
    step = 0
    weights: Path | None = None
    if checkpoint != "base":
        store = CheckpointStore(run / "checkpoints")
        weights = store.best if checkpoint == "best" else store.last
        step = read_checkpoint(weights)["step"]
    solver = load_solver(config, weights)
    with progress_bars(console) as bars:
        bar = bars.add_task("attempt", total=attempts, note="that went wrong")
        draw = draw_attempts(
            solver,
            split=split,
            attempts=attempts,
            problems=problems,
            samples=samples or max(section.group_size for section in sections),
            seed=derive_seed(seed, "analyze"),
            progress=lambda count: bars.update(bar, completed=min(count, attempts)),
        )
        records = []
        for label, section in zip(method_labels(sections), sections, strict=True):
            bar = bars.add_task("score", total=len(draw.chosen), note=label)
            records.append(
                score_method(
                    solver,
                    config.model_copy(update={"method": section}),
                    draw,
                    progress=partial(bars.advance, bar),
                )
            )
    rollouts = [verdict for group in draw.attempts for verdict in group.verdicts]
    return RunAnalysis(
        run=str(run),
        checkpoint=checkpoint,
        step=step,
        split=split,
        task=config.task.name,
        problems=len(draw.attempts),
        rollouts=len(rollouts),
        wrong=len(draw.wrong),
        as_they_come=len(draw.as_they_come),
        solved=bootstrap(
            [
                sum(v.correct for v in group.verdicts) / len(group.verdicts)
                for group in draw.attempts
            ]
        ),
        knows_steps=any(verdict.wrong_span is not None for verdict in rollouts),
        methods=tuple(
            method_figures(label, section.model_dump(mode="json"), draw, found)
            for label, section, found in zip(
                method_labels(sections), sections, records, strict=True
            )
        ),
        examples=pick_examples(draw, records, count=EXAMPLES),
        seconds=time.perf_counter() - start,
    )


def parse_methods(text: str | None, config: Config) -> list[Any]:
    """Return the method sections that a text names, the run's teacher and loss in each.

    Args:
        text: names or YAML mappings with commas between them, such as
            "stepalign, {name: refsol}"; what a mapping leaves out is the default. None: the run's
            own method.
        config: of the run; a name that is its own method's means exactly that.

    Raises:
        ConfigError: not YAML, not a method, or a method without a teacher.
    """
    own = config.method.model_dump(mode="json")
    shared = {key: own[key] for key in ("teacher", "loss", "group_size") if key in own}
    try:
        asked = [own] if text is None else yaml.safe_load(f"[{text}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"methods: {text!r} is not a list of names or YAML: {error}") from error
    sections = []
    for entry in asked:
        section = {"name": entry} if isinstance(entry, str) else entry
        if section == {"name": own["name"]}:
            section = own
        elif isinstance(section, dict) and "teacher" in own:
            section = {**shared, **section}
        try:
            sections.append(TypeAdapter(MethodConfig).validate_python(section))
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'name'}: {e['msg']}" for e in error.errors()
            )
            raise ConfigError(
                f"methods: {entry!r} is not a method: {wrong}. Give names or mappings as under "
                "`method:` in a configuration, with commas between them"
            ) from error
        if not hasattr(sections[-1], "teacher"):
            raise ConfigError(
                f"methods: {section['name']} has no teacher, so its advantage is one number for "
                "a whole attempt and there is nothing to locate. Name a method with a teacher, "
                "such as --methods stepalign,refsol: it is scored on this run's attempts"
            )
    return sections


def method_labels(sections: Sequence[Any]) -> list[str]:
    """Return a short unique name for each section: the method's, and what it changes."""
    names = []
    for section in sections:
        found = flatten(section.model_dump(mode="json"))
        usual = flatten(type(section)().model_dump(mode="json"))
        changed = [
            f"{key.rsplit('.', 1)[-1]}={value}"
            for key, value in found.items()
            if value != usual.get(key)
            and key.split(".")[0] not in ("name", "teacher", "loss", "group_size")
        ]
        names.append(f"{section.name} ({', '.join(changed)})" if changed else section.name)
    return [
        name if names.count(name) == 1 else f"{name} #{names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def draw_attempts(
    solver: Solver,
    *,
    split: str,
    attempts: int,
    problems: int,
    samples: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Draw:
    """Draw groups, portion by portion, until enough attempts went wrong or problems run out.

    Args:
        solver: writes the attempts.
        split: which problems.
        attempts: how many wrong ones, and how many as they come, to choose.
        problems: at most so many groups.
        samples: attempts at each problem.
        seed: of the sampled tokens.
        progress: called with the number of wrong attempts so far.
    """
    params = SamplingParams(
        temperature=solver.config.rollout.temperature,
        max_new_tokens=solver.config.rollout.max_new_tokens,
    )
    asked = solver.task.problems(split=split, count=problems)
    groups: list[Attempts] = []
    wrong: list[Place] = []
    while len(wrong) < attempts and len(groups) < len(asked):
        groups += sample_attempts(
            solver.engine,
            solver.context.student_prompt,
            solver.task,
            asked[len(groups) : len(groups) + PORTION],
            samples=samples,
            params=replace(params, seed=seed + len(groups)),
        )
        wrong = erroneous_attempts(groups, limit=attempts)
        if progress is not None:
            progress(len(wrong))
    drawn = [(i, j) for i, group in enumerate(groups) for j in range(len(group.rollouts))]
    return Draw(groups, wrong, drawn[:attempts])


def score_method(
    solver: Solver,
    config: Config,
    draw: Draw,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[TokenAnalysis]:
    """Score the chosen attempts as `config.method` would; one record for each of them."""
    base = load_solver(config).model
    teacher, teacher_model = build_teacher(config, solver.model, base=base)
    return analyze(
        solver,
        teacher,
        build_method(config, solver.task),
        draw.attempts,
        draw.chosen,
        heads=(lm_head(solver.model), lm_head(teacher_model)),
        progress=progress,
    )


def method_figures(
    label: str, settings: dict[str, Any], draw: Draw, records: Sequence[TokenAnalysis]
) -> MethodAnalysis:
    """Aggregate the records of one method, one for each of `draw.chosen`."""
    at = dict(zip(draw.chosen, records, strict=True))
    wrong = [at[place] for place in draw.wrong]
    come = [at[place] for place in draw.as_they_come]
    later = [r for r in wrong if not first_step_wrong(r)]
    masks = mask_effects(come)
    return MethodAnalysis(
        label=label,
        settings=settings,
        all_wrong=localise(wrong),
        first_wrong=localise([r for r in wrong if first_step_wrong(r)]),
        later_wrong=localise(later),
        wrong=overall(wrong),
        right=overall([r for r in come if r.correct and r.wrong_tokens is None]),
        profile=tuple(profile(later)),
        masks=tuple(masks),
        suggested=suggest(masks),
    )


def pick_examples(
    draw: Draw, records: Sequence[Sequence[TokenAnalysis]], *, count: int
) -> tuple[Example, ...]:
    """Choose wrong attempts at different problems, evenly from sharp to faint disagreement.

    The first method decides; those whose first error follows a right step are preferred.
    """
    from selfdistill.report.heatmap import clear_examples, spread

    places = {place: i for i, place in enumerate(draw.chosen)}
    first: dict[str, TokenAnalysis] = {}
    index = {}
    for place in draw.wrong:
        record = records[0][places[place]]
        if first.setdefault(record.problem_id, record) is record:
            index[record.problem_id] = places[place]
    picked = spread(clear_examples(list(first.values())) or list(first.values()), count=count)
    return tuple(
        Example(tuple(found[index[record.problem_id]] for found in records)) for record in picked
    )


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
                localisation_table(title, {m.label: getattr(m, field) for m in methods}, note=note)
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
    if analysis.knows_steps or not analysis.wrong:
        return "" if analysis.wrong else "No attempt went wrong: there is no error to look at."
    return (
        f"The checker of task {analysis.task!r} judges answers and marked no wrong step, so "
        "nothing can be said about before, at and after the first error, nor about how much of "
        "the advantage lies on it. Shown are whole attempts, wrong ones beside right ones, and "
        "what masks keep."
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


def write_analysis(analysis: RunAnalysis, folder: Path) -> Path:
    """Write analysis.json, analysis.md and analysis.html; return the page."""
    from selfdistill.report.analysis import analysis_page

    tables = [*analysis_tables(analysis), *map(masks_table, analysis.methods)]
    lead = "\n\n".join(filter(None, (summary_line(analysis), missing_note(analysis))))
    write_atomically(
        folder / "analysis.md",
        f"# Per-token advantage\n\n{lead}\n\n" + "\n".join(t.markdown() for t in tables),
    )
    write_atomically(
        folder / "analysis.json", TypeAdapter(RunAnalysis).dump_json(analysis, indent=1).decode()
    )
    page = folder / "analysis.html"
    write_atomically(page, analysis_page(analysis))
    return page
