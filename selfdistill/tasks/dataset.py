"""Problems with known answers from files or data sets: reading, splitting, checking."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdistill.config import (
    DatasetTaskConfig,
    HashedSplits,
    HubTaskConfig,
    JsonlTaskConfig,
    NamedSplits,
    Shares,
)
from selfdistill.tasks import SPLITS, Problem, TaskError, Verdict
from selfdistill.tasks.answers import AnswerChecker, build_checker, majority
from selfdistill.tasks.steps import follows_format, read_answer

INSTALL_DATASETS = "pip install 'datasets>=3'"


class DatasetTask:
    """Problems with final answers that can be compared (implements `selfdistill.tasks.Task`).

    Args:
        name: as written in a configuration.
        splits: the problems of each split, already without overlap.
        instruction: how to write the answer.
        checker: compares answers.
    """

    strict_means = "in the step format"

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Problem]],
        *,
        instruction: str,
        checker: AnswerChecker,
    ) -> None:
        self.name = name
        self.instruction = instruction
        self.checker = checker
        self._splits = {split: list(splits.get(split, ())) for split in SPLITS}

    def size(self, split: str) -> int:
        """Return how many problems a split has.

        Raises:
            ValueError: an unknown split.
        """
        if split not in self._splits:
            raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
        return len(self._splits[split])

    def problems(self, *, split: str, count: int, seed: int = 0) -> list[Problem]:
        """Return the first `count` problems of a split in the order that `seed` gives.

        Raises:
            TaskError: the split has fewer.
            ValueError: an unknown split or a negative count.
        """
        if count < 0:
            raise ValueError(f"count: got {count}, expected 0 or more")
        if count > self.size(split):
            raise TaskError(
                f"{count} {split} problems were asked for, but the {self.name} task has "
                f"{self.size(split)}: ask for fewer, or give it more (task.splits)"
            )
        order = list(self._splits[split])
        random.Random(f"{split}/{seed}").shuffle(order)
        return order[:count]

    def check(self, problem: Problem, response: str) -> Verdict:
        """Judge the final answer; the steps cannot be judged, only that they have their tags."""
        answer = read_answer(response)
        correct = answer is not None and self.checker.equal(problem.answer, answer)
        return Verdict(
            answer=answer,
            correct=correct,
            strict=correct and follows_format(response),
            first_wrong_step=None,
            wrong_span=None,
            complete=answer is not None,
        )

    def responses_agree(self, answers: Sequence[str]) -> str | None:
        """Return the first answer of the largest class of equal ones; ties go to the earliest."""
        return majority(answers, self.checker.equal)


@dataclass(frozen=True)
class Row:
    """One record and where it comes from, for messages."""

    fields: Mapping[str, Any]
    place: str


def load_dataset_task(config: JsonlTaskConfig | HubTaskConfig) -> DatasetTask:
    """Read the configured problems.

    Raises:
        TaskError: a source or a field is missing, a problem is in two splits, or a package that
            the configuration asks for is not installed.
    """

    def read(source: str) -> list[Problem]:
        rows = jsonl_rows(Path(source)) if config.name == "jsonl" else hub_rows(config, source)
        return read_problems(rows, config, source=source)

    match config.splits:
        case HashedSplits(all=source, shares=shares):
            splits = split_by_hash(read(source), shares)
        case NamedSplits() as named:
            sources = {split: getattr(named, split) for split in SPLITS}
            splits = {split: read(source) for split, source in sources.items() if source}
            refuse_overlap(splits)
    return DatasetTask(
        config.name,
        splits,
        instruction=config.instruction,
        checker=build_checker(config.checker),
    )


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a file with one JSON object a line; empty lines are left out.

    Raises:
        TaskError: there is no such file, or a line is not a JSON object.
    """
    try:
        file = path.open(encoding="utf-8")
    except OSError as error:
        raise TaskError(f"task.splits: cannot read {path}: {error.strerror}") from error
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{place} is not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise TaskError(f"{place} holds a {type(fields).__name__}, expected an object")
            yield Row(fields, place)


def hub_rows(config: HubTaskConfig, split: str) -> Iterator[Row]:
    """Yield the rows of one split of a data set, from the Hub, its cache, or a local folder.

    Raises:
        TaskError: the datasets library is missing, or cannot find the data set or the split.
    """
    try:
        import datasets
    except ImportError as error:
        raise TaskError(f"the hub task needs the datasets library: {INSTALL_DATASETS}") from error
    folder = Path(config.path)
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        if saved:
            loaded = datasets.load_from_disk(str(folder))
            # A single saved Dataset knows the name of its split.
            found = loaded if isinstance(loaded, dict) else {str(loaded.split): loaded}
            if split not in found:
                raise TaskError(
                    f"task.splits: {folder} has no split {split!r}, only {', '.join(found)}"
                )
            rows = found[split]
        else:
            rows = datasets.load_dataset(
                config.path,
                config.config,
                split=split,
                revision=config.revision,
                streaming=config.streaming,
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, TaskError):
            raise
        raise TaskError(
            f"task.path: the datasets library cannot load split {split!r} of {config.path!r}: "
            f"{error}\nWithout a network, save the data set where there is one "
            "(datasets.load_dataset(...).save_to_disk(folder)) and give that folder as task.path."
        ) from error
    wanted = {config.question, config.answer, config.reference, config.id, *config.where}
    if rows.column_names is not None:  # wide columns that nobody asked for are never read
        rows = rows.select_columns([name for name in rows.column_names if name in wanted])
    for number, fields in enumerate(rows):
        yield Row(fields, f"{config.path}, split {split}, row {number}")


def read_problems(rows: Iterable[Row], config: DatasetTaskConfig, *, source: str) -> list[Problem]:
    """Turn rows into distinct problems; of the same question the first row counts.

    Raises:
        TaskError: a row lacks a field, two questions have one id, or nothing is left.
    """
    problems: dict[str, Problem] = {}
    by_id: dict[str, Problem] = {}
    for row in rows:
        if len(problems) == config.limit:
            break
        if any(row.fields.get(name) != value for name, value in config.where.items()):
            continue
        problem = _problem(row, config)
        if question_key(problem) in problems:
            continue
        if problem.id in by_id:
            raise TaskError(
                f"{row.place}: the id {problem.id!r} was given to another question before; name "
                "a field with unique ids (task.id), or none"
            )
        problems[question_key(problem)] = by_id[problem.id] = problem
    if not problems:
        raise TaskError(f"{source} holds no problem (task.where: {config.where or 'all rows'})")
    return list(problems.values())


def _problem(row: Row, config: DatasetTaskConfig) -> Problem:
    question = _text(row, config.question, "question")
    return Problem(
        id=_text(row, config.id, "id") if config.id else _digest(" ".join(question.split()))[:16],
        question=question,
        answer=_text(row, config.answer, "answer"),
        reference=_text(row, config.reference, "reference") if config.reference else "",
    )


def _text(row: Row, field: str, role: str) -> str:
    value = row.fields.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise TaskError(
            f"{row.place}: field {field!r} (task.{role}) holds {value!r}, expected text or a "
            f"number; the row's fields are {', '.join(row.fields)}"
        )
    return value.strip()


def question_key(problem: Problem) -> str:
    """What two problems with the same question have in common: its words."""
    return " ".join(problem.question.split())


def split_by_hash(problems: Iterable[Problem], shares: Shares) -> dict[str, list[Problem]]:
    """Cut problems by the hash of their ids: where one belongs does not depend on the others."""
    splits: dict[str, list[Problem]] = {split: [] for split in SPLITS}
    for problem in problems:
        place = int(_digest(problem.id)[:12], 16) / 16**12
        if place < shares.train:
            splits["train"].append(problem)
        elif place < shares.train + shares.dev:
            splits["dev"].append(problem)
        else:
            splits["test"].append(problem)
    return splits


def refuse_overlap(splits: Mapping[str, Sequence[Problem]]) -> None:
    """Make sure that no question is in two splits.

    Raises:
        TaskError: names two such problems.
    """
    seen: dict[str, tuple[str, Problem]] = {}
    for split, problems in splits.items():
        for problem in problems:
            key = question_key(problem)
            if key in seen:
                other_split, other = seen[key]
                raise TaskError(
                    f"task.splits: {split} and {other_split} overlap: problem {problem.id!r} of "
                    f"{split} asks the question of {other.id!r} of {other_split}. Remove one, or "
                    "give one source as task.splits.all and let the hash of the ids decide"
                )
            seen[key] = (split, problem)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
