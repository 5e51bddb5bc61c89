"""`selfdistill analyze`: what the teacher's context does to the advantage, over many attempts.

The run's own solver (of a chosen checkpoint) attempts problems of a split. The same attempts are
then scored by each method that was asked for: the method decides what the teacher sees, while
teacher weights, loss and attempts stay the same, so that only the context differs.
`selfdistill.analysis.report` shows the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers.utils import logging as transformers_logging

from selfdistill.analysis.alignment import clear_examples, spread
from selfdistill.analysis.draw import Draw, draw_attempts, share_solved
from selfdistill.analysis.localisation import (
    Localisation,
    MaskEffect,
    Overall,
    ProfilePoint,
    first_step_wrong,
    localise,
    mask_effects,
    overall,
    profile,
    share_times,
    suggest,
)
from selfdistill.analysis.sections import method_labels, parse_methods
from selfdistill.analysis.tokens import TokenAnalysis, analyze
from selfdistill.config import Config, load_config
from selfdistill.evaluation.intervals import Interval
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.teacher import build_teacher
from selfdistill.progress import progress_bars
from selfdistill.seeds import derive_seed
from selfdistill.training.checkpoint import CheckpointStore, fingerprint, restore_teacher
from selfdistill.training.solver import Solver, load_solver
from selfdistill.training.state_file import digest_inputs, read_state, refuse_other

Checkpoint = Literal["best", "last", "base"]

EXAMPLES = 4


@dataclass(frozen=True)
class MethodAnalysis:
    """One method's figures; the attempts are the same for all methods.

    Attributes:
        label: short, and unique within the analysis.
        settings: the method's configuration section.
        without_context: attempts for which the method has nothing to show to the teacher; they
            are in none of the figures.
        all_wrong: attempts with a wrong step.
        first_wrong: those whose first step is the wrong one: nothing right comes before it.
        later_wrong: those whose first error follows a right step.
        share_times: over those of them that both methods have a context for, the first method's
            share of |A| on the wrong step divided by this one's.
        wrong: all attempts that went wrong, whether their steps are known or not.
        right: attempts with the right answer and no wrong step.
        profile: mean advantage by distance from the start of the wrong step, over `later_wrong`.
        masks: over attempts as they come, right and wrong ones, as training sees them.
        suggested: the mask with the fewest tokens that keeps 90 % of the sum of |A|, or None.
    """

    label: str
    settings: dict[str, Any]
    without_context: int
    all_wrong: Localisation
    first_wrong: Localisation
    later_wrong: Localisation
    share_times: Interval | None
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
        problems, rollouts: how many were attempted, and how often in all.
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


def analyze_run(
    run: Path,
    *,
    checkpoint: Checkpoint = "best",
    methods: str | None = None,
    attempts: int = 500,
    problems: int = 1000,
    samples: int = 1,
    split: str = "test",
    seed: int = 0,
    console: Console | None = None,
) -> RunAnalysis:
    """Draw attempts from a run's solver and score them by one or more methods.

    Args:
        run: the folder of a training run.
        checkpoint: whose weights write the attempts; "base": those before training.
        methods: see `parse_methods`; None: the run's own method.
        attempts: how many that went wrong to look at; fewer, where 10 times as many attempts
            give no more.
        problems: of the split; they are gone through again where once is not enough.
        samples: attempts at each problem at a time. More than 1 for a context that comes from the
            rest of the group, such as another attempt that was right.
        split: "dev" or "test".
        seed: of the sampled tokens.
        console: where progress is shown; the standard error stream by default.

    Raises:
        CheckpointError: there is no such checkpoint, it is torn, or it is another run's than
            config.yaml says: see `load_solver`.
        ConfigError: `methods` asks for something that does not exist, or follows no teacher.
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
        step = read_state(weights).step
    # The weights are checked against the run before they write anything.
    solver = load_solver(config, weights)
    if weights is None and (last := CheckpointStore(run / "checkpoints").last).exists():
        refuse_other(
            last,
            read_state(last),
            config=config.model_dump(mode="json"),
            base_sha256=fingerprint(solver.model),
            inputs=digest_inputs(solver.task, solver.tokenizer),
        )
    with progress_bars(console) as bars:
        bar = bars.add_task("attempt", total=attempts, note="that went wrong")
        draw = draw_attempts(
            solver,
            split=split,
            attempts=attempts,
            problems=problems,
            samples=samples,
            seed=derive_seed(seed, "analyze"),
            progress=lambda count: bars.update(bar, completed=min(count, attempts)),
        )
        # All methods score the same attempts, so that only what the teacher sees differs.
        records = []
        for label, section in zip(method_labels(sections), sections, strict=True):
            bar = bars.add_task("score", total=len(draw.chosen), note=label)
            records.append(
                score_method(
                    solver,
                    config.model_copy(update={"method": section}),
                    draw,
                    checkpoint=weights,
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
        problems=len({group.problem.id for group in draw.attempts}),
        rollouts=len(rollouts),
        wrong=len(draw.wrong),
        as_they_come=len(draw.as_they_come),
        solved=share_solved(draw.attempts),
        knows_steps=any(verdict.wrong_span is not None for verdict in rollouts),
        methods=tuple(
            method_figures(label, section.model_dump(mode="json"), draw, found, first=records[0])
            for label, section, found in zip(
                method_labels(sections), sections, records, strict=True
            )
        ),
        examples=pick_examples(draw, records, count=EXAMPLES),
        seconds=time.perf_counter() - start,
    )


def score_method(
    solver: Solver,
    config: Config,
    draw: Draw,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[TokenAnalysis]:
    """Score the chosen attempts as `config.method` would; one record for each of them.

    Args:
        solver: the student, with the weights of `checkpoint`.
        config: names the method and its teacher.
        draw: the attempts.
        checkpoint: holds the state of an EMA teacher; None: as before training.
        progress: called with the number of attempts just scored.

    Raises:
        CheckpointError: the teacher has a state, and the checkpoint has none; or the run started
            from other base weights.
    """
    base = load_solver(config).model
    teacher = build_teacher(config.method.teacher, solver.model, base=base)
    assert teacher is not None  # every Distillation has one
    if checkpoint is not None:
        refuse_other(checkpoint, read_state(checkpoint), base_sha256=fingerprint(base))
        restore_teacher(checkpoint, teacher)
    return analyze(
        solver,
        teacher,
        solver.build_method(config.method),
        draw.attempts,
        draw.chosen,
        lm_heads=find_lm_heads(solver.model, teacher),
        progress=progress,
    )


def method_figures(
    label: str,
    settings: dict[str, Any],
    draw: Draw,
    records: Sequence[TokenAnalysis],
    *,
    first: Sequence[TokenAnalysis],
) -> MethodAnalysis:
    """Aggregate the records of one method, one for each of `draw.chosen`.

    Attempts for which the method has no context are left out, as training leaves them out.

    Args:
        label, settings: of the method.
        draw: the attempts.
        records: of this method.
        first: of the method that it is compared with.
    """
    at = {
        place: record for place, record in zip(draw.chosen, records, strict=True) if record.context
    }
    compared = [
        pair
        for place, *pair in zip(draw.chosen, first, records, strict=True)
        if place in draw.wrong
        and all(record.context and not first_step_wrong(record) for record in pair)
    ]
    wrong = [at[place] for place in draw.wrong if place in at]
    come = [at[place] for place in draw.as_they_come if place in at]
    later = [r for r in wrong if not first_step_wrong(r)]
    masks = mask_effects(come)
    return MethodAnalysis(
        label=label,
        settings=settings,
        without_context=len(draw.chosen) - len(at),
        all_wrong=localise(wrong),
        first_wrong=localise([r for r in wrong if first_step_wrong(r)]),
        later_wrong=localise(later),
        share_times=share_times([a for a, _ in compared], [b for _, b in compared]),
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
