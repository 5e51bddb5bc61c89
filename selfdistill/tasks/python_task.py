"""A task in one Python file: problems, a reward, and where it has them steps and feedback.

    def problems():                                     # or problems(split)
        return [{"prompt": "2 + 2 = ?", "solution": "4"}, ...]

    def reward(prompts, completions, solution, **columns):
        return [float(s in c) for c, s in zip(completions, solution)]

The reward has the signature of TRL's `reward_funcs`: keyword arguments `prompts`, `completions` and
every other column of the problems, a list with an entry for each completion. Prompts that are lists
of messages come with completions that are lists of messages; texts come with texts.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfdistill.config import PythonTaskConfig
from selfdistill.tasks.answers import PlainChecker, majorities
from selfdistill.tasks.final_answer import read_answer
from selfdistill.tasks.interface import (
    SPLITS,
    FeedbackDetail,
    Problem,
    TaskError,
    Verdict,
)
from selfdistill.tasks.splits import (
    ProblemList,
    cut_problems,
    question_id,
    question_key,
    refuse_overlap,
)
from selfdistill.tasks.user_file import Function, UserFile, accepted, name_of

# What TRL's trainers hand over beside the columns and this one does not have.
_NOT_HERE = ("completion_ids", "trainer_state", "environments")
# What a reward is told beside the columns.
_BESIDE_COLUMNS = ("prompts", "completions", "log_extra", "log_metric")


def load_python_task(config: PythonTaskConfig) -> PythonTask:
    """Run the configured file, and ask it for its problems.

    Raises:
        TaskError: the file cannot be used; the message names its line.
    """
    file = UserFile(Path(config.file), setting="task.file")
    reward, source = file.function("reward"), file.function("problems")
    if source is None or reward is None:
        missing = "problems" if source is None else "reward"
        raise TaskError(
            f"{file.path}: there is no function {missing!r}, expected problems() and "
            "reward(prompts, completions, **columns)"
        )
    rows: dict[str, list[_Row]] = {}
    if inspect.signature(source).parameters:
        rows = {split: _rows(file, source, split) for split in SPLITS}
        splits = {split: [row.problem for row in found] for split, found in rows.items()}
        refuse_overlap(splits, place=file.place(source), together="problems() without an argument")
    else:
        rows = {"all": _rows(file, source)}
        splits = cut_problems([row.problem for row in rows["all"]], config)
    # By question: ids may come again in another split, questions may not.
    by_question = {question_key(row.problem): row for found in rows.values() for row in found}
    return PythonTask(file, splits, by_question, config)


class _Row:
    """One problem as the file gave it.

    Attributes:
        problem: what the trainer knows of it.
        prompt: what the reward is told: a text, or a list of messages.
        columns: all else.
    """

    def __init__(self, fields: Mapping[str, Any], place: str) -> None:
        for name in (*_BESIDE_COLUMNS, *_NOT_HERE):
            if name in fields:
                raise TaskError(
                    f"{place}: it has the key {name!r}, which is an argument of the reward that "
                    "trainers hand over: call it something else"
                )
        self.columns = {name: value for name, value in fields.items() if name != "prompt"}
        self.prompt = fields.get("prompt", fields.get("question"))
        question = self.prompt
        if self.is_conversation:
            turns = self.prompt
            if len(turns) != 1 or turns[0].get("role") != "user":
                raise TaskError(
                    f"{place}: the prompt has the turns {[turn.get('role') for turn in turns]}, "
                    "expected one of the user: prompt.system and prompt.few_shot are for others"
                )
            question = turns[0].get("content")
        if not isinstance(question, str) or not question.strip():
            raise TaskError(
                f"{place}: the prompt is {question!r:.80}, expected a text, or a list with one "
                f"message of the user; the problem has {', '.join(map(str, fields))}"
            )
        # None is what a table has where a row has nothing, and 0 is an id and an answer.
        own_id, answer = fields.get("id"), fields.get("answer")
        self.problem = Problem(
            id=question_id(question) if own_id is None else str(own_id),
            question=question.strip(),
            answer="" if answer is None else str(answer),
            reference=str(fields.get("reference") or ""),
        )

    @property
    def is_conversation(self) -> bool:
        """Whether the prompt is a list of messages, and so a completion is one, too."""
        return (
            isinstance(self.prompt, Sequence)
            and not isinstance(self.prompt, str)
            and all(isinstance(turn, Mapping) for turn in self.prompt)
        )

    def completion(self, text: str) -> Any:
        return [{"role": "assistant", "content": text}] if self.is_conversation else text


def _rows(file: UserFile, source: Function, *split: str) -> list[_Row]:
    """Ask the file for problems; of the same question the first one counts."""
    place = file.place(source)
    found = file.call(lambda: list(source(*split)))
    rows: dict[str, _Row] = {}
    ids: set[str] = set()
    for number, fields in enumerate(found):
        if not isinstance(fields, Mapping):
            raise TaskError(
                f"{place}: problem {number} is a {type(fields).__name__}, expected a dictionary "
                "with a prompt and what the reward wants to know"
            )
        row = _Row(fields, f"{place}: problem {number}")
        if question_key(row.problem) in rows:
            continue
        if row.problem.id in ids:
            raise TaskError(
                f"{place}: problem {number} has the id {row.problem.id!r} of another question: "
                "give each its own, or none"
            )
        ids.add(row.problem.id)
        rows[question_key(row.problem)] = row
    if not rows and split in ((), ("train",)):
        raise TaskError(f"{place}: {name_of(source)} returned no problem")
    return list(rows.values())


class PythonTask(ProblemList):
    """Problems and a reward of somebody's own (implements `Task`).

    It has `step_spans` where the file has `steps`, and `feedback` where it has that.

    Args:
        file: with the functions.
        splits: the problems of each split.
        rows: the problems as the file gave them, by `question_key`.
        config: of the task.

    Attributes:
        sources: the digest of the file, for checkpoints; what it imports has no part in it.

    Raises:
        TaskError: the reward asks for what there is not.
    """

    name = "python"
    strict_means = "as a right answer"

    def __init__(
        self,
        file: UserFile,
        splits: Mapping[str, Sequence[Problem]],
        rows: Mapping[str, _Row],
        config: PythonTaskConfig,
    ) -> None:
        super().__init__(splits)
        self.instruction = config.instruction
        self.sources = {"task file": hashlib.sha256(file.source).hexdigest()}
        self._file, self._rows, self._config = file, rows, config
        columns = {name for row in rows.values() for name in row.columns}
        self._columns = sorted(columns)
        reward = file.function("reward")
        assert reward is not None
        self._reward = reward
        self._check_arguments(reward)
        self._answer = file.function("answer")
        if (steps := file.function("steps")) is not None:
            self._steps = steps
            self.step_spans = self._step_spans
        if (feedback := file.function("feedback")) is not None:
            self._feedback = feedback
            self._check_arguments(feedback)
            self.feedback = self._feedback_on

    def check(self, problem: Problem, response: str) -> Verdict:
        """Judge one response."""
        return self.check_all([(problem, response)])[0]

    def check_all(self, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Ask the file's reward about many responses at once.

        Raises:
            TaskError: it failed, or returned something else than a number for each of them.
        """
        if not attempts:
            return []
        rewards = self._one_each(self._reward, attempts, "a number, or None where it has no say")
        verdicts = []
        for (_, response), given in zip(attempts, rewards, strict=True):
            answer = self._read_answer(response)
            reward = self._number(given)
            correct = reward is not None and reward >= self._config.correct_from
            verdicts.append(
                Verdict(
                    answer=answer,
                    correct=correct,
                    strict=correct,
                    first_wrong_step=None,
                    wrong_span=None,
                    complete=answer is not None,
                    undecided=reward is None,
                    score=reward or 0.0,
                )
            )
        return verdicts

    def majorities(self, groups: Sequence[Sequence[str]]) -> list[str | None]:
        """Return the majority answer of each group: equal numbers and equal words are one."""
        return majorities(groups, PlainChecker())

    def _step_spans(self, response: str) -> list[tuple[int, int]]:
        found = self._file.call(self._steps, response)
        place, end, spans = self._file.place(self._steps), 0, []
        try:
            for start, stop in found:
                if not end <= start < stop <= len(response):
                    raise ValueError(f"({start}, {stop}) after character {end}")
                spans.append((int(start), int(stop)))
                end = stop
        except (TypeError, ValueError) as error:
            raise TaskError(
                f"{place}: {name_of(self._steps)} returned {found!r:.80} for a completion of "
                f"{len(response)} characters, expected a list of (start, stop), each after the "
                f"other ({error})"
            ) from error
        return spans

    def _feedback_on(
        self, problem: Problem, response: str, verdict: Verdict, *, detail: FeedbackDetail
    ) -> str:
        (text,) = self._one_each(self._feedback, [(problem, response)], "a text, or None")
        if text is not None and not isinstance(text, str):
            raise TaskError(
                f"{self._file.place(self._feedback)}: {name_of(self._feedback)} returned "
                f"[{text!r:.80}], expected a list of texts, or None where there is nothing to say"
            )
        return text or ""

    def _one_each(
        self, function: Function, attempts: Sequence[tuple[Problem, str]], what: str
    ) -> list[Any]:
        """Call a function of the reward's signature."""
        rows = [self._rows[question_key(problem)] for problem, _ in attempts]
        offered: dict[str, Any] = {
            "prompts": [row.prompt for row in rows],
            "completions": [
                row.completion(text) for row, (_, text) in zip(rows, attempts, strict=True)
            ],
            **{name: [row.columns.get(name) for row in rows] for name in self._columns},
            "log_extra": _ignore,
            "log_metric": _ignore,
        }
        takes, _ = accepted(function, offered)
        found = self._file.call(function, **{name: offered[name] for name in takes})
        try:
            results = list(found)
        except TypeError:
            results = []
        if len(results) != len(attempts) or isinstance(found, (str, Mapping)):
            raise TaskError(
                f"{self._file.place(function)}: {name_of(function)} returned {found!r:.80} for "
                f"{len(attempts)} completions, expected a list with {what} for each"
            )
        return results

    def _number(self, given: Any) -> float | None:
        """Return a reward as a number; None where the file has no say."""
        if given is None:
            return None
        try:
            reward = float(given)
        except (TypeError, ValueError):
            reward = math.nan
        if not math.isfinite(reward):
            raise TaskError(
                f"{self._file.place(self._reward)}: {name_of(self._reward)} gave the reward "
                f"{given!r:.80}, expected a finite number, or None where it has no say"
            )
        return reward

    def _read_answer(self, response: str) -> str | None:
        if self._answer is None:
            return read_answer(response, self._config.answer_forms)
        found = self._file.call(self._answer, response)
        return None if found is None else str(found)

    def _check_arguments(self, function: Function) -> None:
        offered = (*_BESIDE_COLUMNS, *self._columns)
        _, missing = accepted(function, offered)
        if not missing:
            return
        name = min(missing)
        why = (
            "which is not handed over here: read the completions"
            if name in _NOT_HERE
            else "which no problem has"
        )
        raise TaskError(
            f"{self._file.place(function)}: {name_of(function)} asks for the argument {name!r}, "
            f"{why}. There are prompts, completions and the columns {', '.join(self._columns)}"
        )


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand for what TRL's trainers log by."""
