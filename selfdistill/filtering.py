"""The paper's filter: keep the problems that the solver rarely solves and the critic does.

Everything examined goes to a journal beside the output, one JSON line a problem, so a killed run
goes on where it was, with the same result as an undisturbed one.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from selfdistill.config import Config, ConfigError
from selfdistill.critic.interface import Critic
from selfdistill.errors import UserError
from selfdistill.places import alone_in
from selfdistill.progress import progress_bars
from selfdistill.rollout.attempts import Attempts, sample_attempts
from selfdistill.runlog import JsonLines, write_atomically
from selfdistill.tasks.interface import SPLITS, Problem, Task, TaskError, check_all
from selfdistill.training.solver import (
    Solver,
    load_solver,
    recorded_date,
    sampling_params,
    with_date,
)

# Problems between two writes of the journal: what a kill can cost.
PORTION = 16

Outcome = Literal["kept", "too_easy", "critic_failed"]


class FilterExistsError(UserError):
    """The output or its journal is not this filter's."""


@dataclass(frozen=True)
class FilterSettings:
    """What is kept.

    Attributes:
        samples: attempts of the solver at each problem.
        below: a problem is kept when a smaller share of them is right.
        critic_samples: attempts that the critic rewrites; one right answer of its own is enough.
        split: which split of the task, or "all" of them.
        problems: at most so many of each split; None: all.
        seed: of the sampled tokens.
    """

    samples: int = 16
    below: Fraction = Fraction(5, 16)
    critic_samples: int = 1
    split: str = "all"
    problems: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Examined:
    """One line of the journal: a problem, its split, right attempts of the base, and what became
    of it."""

    id: str
    question: str
    answer: str
    reference: str
    split: str
    samples: int
    correct: int
    outcome: Outcome


@dataclass(frozen=True)
class FilterReport:
    """What the filter did with each problem."""

    settings: FilterSettings
    examined: tuple[Examined, ...]

    def count(self, outcome: Outcome) -> int:
        """Return how many problems ended so."""
        return sum(problem.outcome == outcome for problem in self.examined)

    def table(self) -> Table:
        """Return how often the base solved the problems, and which of them were kept."""
        samples = self.settings.samples
        table = Table(
            title=f"{len(self.examined)} problems: {self.count('kept')} kept, "
            f"{self.count('too_easy')} too easy (base Avg@{samples} of {self.settings.below} or "
            f"more), {self.count('critic_failed')} that the critic failed",
            title_justify="left",
        )
        for name in (f"base Avg@{samples}", "problems", "kept", "too easy", "critic failed"):
            table.add_column(name, justify="right")
        groups = Counter((problem.correct, problem.outcome) for problem in self.examined)
        for correct in sorted({problem.correct for problem in self.examined}):
            counts = [groups[correct, o] for o in ("kept", "too_easy", "critic_failed")]
            table.add_row(f"{correct}/{samples}", str(sum(counts)), *map(str, counts))
        return table


def filter_problems(
    config: Config, output: Path, settings: FilterSettings, *, console: Console
) -> FilterReport:
    """Examine a task's problems and write the kept ones as JSON lines.

    The file has the fields id, question, answer, reference and split, and can be read as
    `task: {name: jsonl, splits: {all: FILE}, id: id, reference: reference}`. What is examined goes
    to FILE.journal; with it, the same call goes on after an interrupt.

    Args:
        config: names the solver, its sampling, the task and the critic.
        output: the file to write; complete as soon as it is there.
        settings: what is kept.
        console: where progress is shown.

    Raises:
        ConfigError: the method has no critic.
        FilterExistsError: the output, or the journal, is not this filter's.
        PlaceTakenError: another process writes the same file.
        TaskError: the task has no such problems.
    """
    with alone_in(output.parent, lock=f".{output.name}.lock"):
        return _filter_problems(config, output, settings, console=console)


def _filter_problems(
    config: Config, output: Path, settings: FilterSettings, *, console: Console
) -> FilterReport:
    journal = JsonLines(output.with_name(output.name + ".journal"))
    if os.path.lexists(output) and not journal.path.exists():
        raise FilterExistsError(
            f"{output} is there already, and no filter wrote it (it would have left "
            f"{journal.path.name} beside it): choose another --output"
        )
    if config.prompt.date is None:  # a filter keeps the day of its first start
        begun = journal.read()
        config = with_date(config, recorded_date(begun[0] if begun else {}) or date.today())
    # What an earlier call examined is taken over before anything is loaded, or refused.
    examined = _resume(journal, _identity(config, settings))
    solver = load_solver(config)
    critic = _critic(solver)
    # The problems follow from the settings alone, so those that are done are the first ones.
    found = _problems(solver.task, settings)
    with_room, left_out = solver.with_room([problem for _, problem in found])
    fitting = {*with_room}
    todo = [(split, problem) for split, problem in found if problem in fitting]
    if left_out:
        console.print(f"{left_out} problems leave no room for an answer and are left out.")
    if examined:
        console.print(f"{len(examined)} of {len(todo)} problems are done already.")
    with progress_bars(console) as bars:
        bar = bars.add_task("filter", total=len(todo), completed=len(examined), note="")
        for start in range(len(examined), len(todo), PORTION):
            portion = todo[start : start + PORTION]
            attempts = sample_attempts(
                solver.engine,
                solver.context.student_prompt,
                solver.task,
                [problem for _, problem in portion],
                samples=settings.samples,
                params=sampling_params(config.rollout, settings.seed + start),
            )
            solved = _solved_by_critic(solver, critic, attempts, settings)
            for (split, _), attempt in zip(portion, attempts, strict=True):
                record = _examine(split, attempt, settings, solved)
                journal.append(asdict(record))
                examined.append(record)
            kept = sum(record.outcome == "kept" for record in examined)
            bars.update(bar, completed=len(examined), note=f"{kept} kept")
    # The result is written in one step at the end: where the file exists, it is whole.
    fields = ("id", "question", "answer", "reference", "split", "correct", "samples")
    kept_lines = "".join(
        json.dumps({field: getattr(record, field) for field in fields}) + "\n"
        for record in examined
        if record.outcome == "kept"
    )
    if not os.path.lexists(output):
        write_atomically(output, kept_lines)
    elif output.read_bytes() != kept_lines.encode():
        raise FilterExistsError(
            f"{output} is not what this filter writes there: somebody changed it. Move it away and "
            "repeat the command; what was examined is kept in the journal"
        )
    return FilterReport(settings, tuple(examined))


def _identity(config: Config, settings: FilterSettings) -> dict[str, Any]:
    """Return the settings that decide which problems are kept."""
    chosen = config.model_dump(mode="json", include={"model", "task", "method", "prompt"})
    rollout = {"temperature": config.rollout.temperature, "length": config.rollout.max_new_tokens}
    return {**chosen, "rollout": rollout, **asdict(settings), "below": str(settings.below)}


def _resume(journal: JsonLines, identity: dict[str, Any]) -> list[Examined]:
    """Return whole portions of the journal, and cut it there; begin it when there is none."""
    if not journal.path.exists():
        write_atomically(journal.path, json.dumps(identity) + "\n")
        return []
    # Its first line is written in one step, so only a file of somebody else has none.
    records = journal.read() or [{}]
    differ = [key for key, value in identity.items() if records[0].get(key) != value]
    if differ:
        raise FilterExistsError(
            f"{journal.path} belongs to a filter with another {', '.join(differ)}: choose another "
            "--output, or remove it to start over"
        )
    # The last portion may be short: it is whole when the run is done, and else done again.
    whole = (len(records) - 1) // PORTION * PORTION
    records = records[: 1 + whole]
    write_atomically(journal.path, "".join(json.dumps(record) + "\n" for record in records))
    return [Examined(**record) for record in records[1:]]


def _critic(solver: Solver) -> Critic:
    method = solver.build_method(solver.config.method)
    if method.critic is None:
        raise ConfigError(
            f"method: the filter asks the critic, and {method.name} has none: filter with "
            "method stepalign, then train with any"
        )
    return method.critic


def _problems(task: Task, settings: FilterSettings) -> list[tuple[str, Problem]]:
    found = []
    for split in SPLITS if settings.split == "all" else (settings.split,):
        size = task.size(split)
        if size is None and settings.problems is None:
            raise TaskError(f"the {task.name} task has no end: say how many --problems to examine")
        count = min(n for n in (size, settings.problems) if n is not None)
        found += [(split, problem) for problem in task.problems(split=split, count=count)]
    if not found:
        raise TaskError(f"the {task.name} task has no {settings.split} problems")
    return found


def _solved_by_critic(
    solver: Solver, critic: Critic, attempts: Sequence[Attempts], settings: FilterSettings
) -> set[str]:
    """Return the ids of the hard problems that a critique of a wrong attempt solves."""
    asked = [
        (attempt.problem, rollout.text)
        for attempt in attempts
        if _is_hard(attempt, settings)
        for rollout in _wrong_first(attempt)[: settings.critic_samples]
    ]
    critiques = critic.critique([p for p, _ in asked], [text for _, text in asked])
    usable = [
        (problem, critique.text)
        for (problem, _), critique in zip(asked, critiques, strict=True)
        if critique is not None
    ]
    verdicts = check_all(solver.task, usable)
    return {
        problem.id
        for (problem, _), verdict in zip(usable, verdicts, strict=True)
        if verdict.correct
    }


def _wrong_first(attempt: Attempts) -> list[Any]:
    pairs = sorted(
        zip(attempt.verdicts, attempt.rollouts, strict=True), key=lambda pair: pair[0].correct
    )
    return [rollout for _, rollout in pairs]


def _is_hard(attempt: Attempts, settings: FilterSettings) -> bool:
    return Fraction(_correct(attempt), settings.samples) < settings.below


def _correct(attempt: Attempts) -> int:
    return sum(verdict.correct for verdict in attempt.verdicts)


def _examine(split: str, attempt: Attempts, settings: FilterSettings, solved: set[str]) -> Examined:
    outcome: Outcome = "too_easy"
    if _is_hard(attempt, settings):
        outcome = "kept" if attempt.problem.id in solved else "critic_failed"
    return Examined(
        **asdict(attempt.problem),
        split=split,
        samples=settings.samples,
        correct=_correct(attempt),
        outcome=outcome,
    )
