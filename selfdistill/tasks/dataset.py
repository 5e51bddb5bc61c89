"""Problems with known answers from files or data sets: reading, splitting, checking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from selfdistill.config import (
    ANSWER_FORMS,
    DatasetTaskConfig,
    HashedSplits,
    HubTaskConfig,
    JsonlTaskConfig,
    NamedSplits,
)
from selfdistill.tasks.answers import AnswerChecker, build_checker, majorities
from selfdistill.tasks.final_answer import read_answer
from selfdistill.tasks.hub import hub_rows
from selfdistill.tasks.interface import SPLITS, Problem, TaskError, Verdict
from selfdistill.tasks.json_lines import jsonl_rows
from selfdistill.tasks.rows import Row
from selfdistill.tasks.splits import (
    ProblemList,
    cut_problems,
    question_id,
    question_key,
    refuse_overlap,
)
from selfdistill.tasks.steps import follows_format


class DatasetTask(ProblemList):
    """Problems with final answers that can be compared (implements `Task`).

    Args:
        name: as written in a configuration.
        splits: the problems of each split, already without overlap.
        instruction: how to write the answer.
        checker: compares answers.
        checker_seconds: a limit for the answers that are compared in one call of `check_all`, or of
            `majorities`.
        answer_forms: how responses give their answers, see `read_answer`.
    """

    def __init__(
        self,
        name: str,
        splits: Mapping[str, Sequence[Problem]],
        *,
        instruction: str,
        checker: AnswerChecker,
        checker_seconds: float | None = None,
        answer_forms: Sequence[str] = ANSWER_FORMS,
    ) -> None:
        super().__init__(splits)
        self.name = name
        self.instruction = instruction
        self.strict_means = "in the step format" if "<step_1>" in instruction else ""
        self.checker = checker
        self.checker_seconds = checker_seconds
        self.answer_forms = answer_forms

    def check(self, problem: Problem, response: str) -> Verdict:
        """Judge the final answer; the steps cannot be judged, only that they have their tags."""
        return self.check_all([(problem, response)])[0]

    def check_all(self, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Judge many responses as `check` does; `checker_seconds` limits the time for all."""
        answers = [read_answer(response, self.answer_forms) for _, response in attempts]
        pairs = [
            (problem.answer, answer)
            for (problem, _), answer in zip(attempts, answers, strict=True)
            if answer is not None
        ]
        equal = dict(
            zip(pairs, self.checker.decide(pairs, seconds=self.checker_seconds), strict=True)
        )
        return [
            _verdict(response, answer, False if answer is None else equal[problem.answer, answer])
            for (problem, response), answer in zip(attempts, answers, strict=True)
        ]

    def majorities(self, groups: Sequence[Sequence[str]]) -> list[str | None]:
        """Return of each group the first answer of its largest class of equal ones (see `Task`).

        `checker_seconds` limits the time for all groups together; what is left then is not equal.
        """
        return majorities(groups, self.checker, seconds=self.checker_seconds)


def _verdict(response: str, answer: str | None, equal: bool | None) -> Verdict:
    return Verdict(
        answer=answer,
        correct=equal is True,
        strict=equal is True and follows_format(response),
        first_wrong_step=None,
        wrong_span=None,
        complete=answer is not None,
        undecided=equal is None,
    )


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
        case HashedSplits(all=source) as cut:
            splits = cut_problems(read(source), cut)
        case NamedSplits() as named:
            sources = {split: getattr(named, split) for split in SPLITS}
            splits = {split: read(source) for split, source in sources.items() if source}
            refuse_overlap(splits, place="task.splits", together="task.splits.all")
    return DatasetTask(
        config.name,
        splits,
        instruction=config.instruction,
        checker=build_checker(config.checker),
        checker_seconds=config.checker_seconds,
        answer_forms=config.answer_forms,
    )


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
    question = row.text(config.question, "question")
    answer = row.text(config.answer, "answer")
    if config.answer_is == "in_solution":
        found = read_answer(answer, config.answer_forms)
        if found is None:
            raise TaskError(
                f"{row.place}: field {config.answer!r} (task.answer) gives no final answer in one "
                f"of the forms {', '.join(config.answer_forms)}: name its form (task.answer_forms),"
                " or set task.answer_is: alone"
            )
        answer = found
    return Problem(
        id=row.text(config.id, "id") if config.id else question_id(question),
        question=question,
        answer=answer,
        reference=row.text(config.reference, "reference") if config.reference else "",
    )
