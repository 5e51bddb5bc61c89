"""Sections of tasks: where problems come from, and who checks answers."""

from __future__ import annotations

import re
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from selfdistill.config.section import (
    Float,
    InputFile,
    Int,
    NearbyName,
    PositiveInt,
    Rate,
    Section,
)

# In the format that `selfdistill.tasks.steps` reads.
STEP_INSTRUCTION = (
    "Solve this step by step. Start each step with its tag, <step_1>, <step_2> and so on, and end "
    "with the tag <answer> followed by the final answer alone."
)
# How responses give their final answers, as `selfdistill.tasks.final_answer` reads them.
ANSWER_FORMS = ("tag", "boxed", "hashes", "phrase")


def _answer_form(form: str) -> str:
    """Refuse what is neither the name of a form nor a regular expression with one group."""
    if form in ANSWER_FORMS:
        return form
    expected = f"expected {', '.join(ANSWER_FORMS)} or a regular expression with one group"
    try:
        groups = re.compile(form, re.MULTILINE).groups
    except re.error as error:
        raise ValueError(f"{expected}; this one is wrong: {error}") from error
    if groups != 1:
        raise ValueError(f"{expected}, the answer; this one has {groups}")
    return form


AnswerForms = Annotated[
    tuple[Annotated[str, AfterValidator(_answer_form)], ...], Field(min_length=1)
]


class ArithmeticTaskConfig(Section):
    """Chained arithmetic with an exact checker (embedded, needs no download)."""

    name: Literal["arithmetic"] = "arithmetic"
    step_counts: tuple[Annotated[Int, Field(ge=1, le=9)], ...] = Field(
        default=(4, 5, 6), min_length=1
    )
    """The numbers of operations that a question may have."""
    reference_dialect: Int = Field(default=0, ge=0, le=5)
    """The wording of the reference solutions; 0 is the shipped solver's usual one."""
    reference_order: Literal["question", "reversed"] = "question"
    """The order in which the reference solutions apply the operations; reversed is another path to
    the same answer."""
    predicted_success: tuple[Rate, Rate] | None = None
    """Only questions that the shipped solver is predicted to solve at a rate in [first, second)."""


class Shares(Section):
    """How large the splits are; a hash of its id decides where a problem belongs."""

    train: Float = Field(default=0.8, ge=0, le=1)
    """Share of the problems that are trained on."""
    dev: Float = Field(default=0.1, ge=0, le=1)
    """Share that chooses the checkpoint."""
    test: Float = Field(default=0.1, ge=0, le=1)
    """Share that is only looked at in the end."""

    @model_validator(mode="after")
    def _whole(self) -> Shares:
        total = self.train + self.dev + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, dev and test must sum to 1, got {total:g}")
        return self


class Counts(Section):
    """How large the splits are, in problems; the hashes of their ids decide which are in which."""

    train: PositiveInt | None = None
    """What is trained on; by default all that dev and test leave."""
    dev: PositiveInt
    """What chooses the checkpoint."""
    test: Int = Field(default=0, ge=0)
    """What is only looked at in the end."""


class Cut(Section):
    """How problems that come together are cut into splits."""

    shares: Shares = Shares()
    """By shares: where a problem belongs does not depend on the others."""
    counts: Counts | None = None
    """By exact numbers, instead of shares."""

    @model_validator(mode="after")
    def _one_way(self) -> Cut:
        # By value: a run's own config.yaml has the defaults written out, too.
        if self.counts is not None and self.shares != Shares():
            raise ValueError("give shares or counts, not both")
        return self


Source = TypeVar("Source")


class NamedSplits(Section, Generic[Source]):
    """One source for each split; a problem that is in two of them is refused."""

    train: Source | None = None
    """What is trained on."""
    dev: Source | None = None
    """What chooses the checkpoint."""
    test: Source | None = None
    """What is only looked at in the end."""

    @model_validator(mode="after")
    def _some(self) -> NamedSplits[Source]:
        if self.train is None and self.dev is None and self.test is None:
            raise ValueError("expected at least one of train, dev and test")
        return self


class HashedSplits(Cut, Generic[Source]):
    """One source, cut by a hash of the problems' ids."""

    all: Source
    """Where all problems are."""


class DatasetTaskConfig(Section):
    """Problems with known final answers, of a file or a data set."""

    question: str = "question"
    """The field that holds the question."""
    answer: str = "answer"
    """The field that holds the final answer."""
    answer_is: Literal["alone", "in_solution"] = "alone"
    """Whether that field holds the answer alone, or a solution whose final answer is read as that
    of a response is (GSM8K's ends in `#### 18`)."""
    reference: str | None = None
    """The field that holds a complete solution; only what shows it to the teacher needs one."""
    id: str | None = None
    """The field that holds a unique identifier; by default the hash of the question is one."""
    where: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Keeps the rows whose fields have these values, such as {problem_type: algebra}."""
    limit: PositiveInt | None = None
    """Reads at most so many distinct problems from each source."""
    instruction: str = STEP_INSTRUCTION
    """Said after each question, to student and teacher alike: how to write steps and answer."""
    answer_forms: AnswerForms = ANSWER_FORMS
    """How a response gives its answer: the first of these that it has counts, and of several the
    last. `tag` (<answer> 42), `boxed`, `hashes` (#### 42), `phrase` (the answer is 42), or a
    regular expression with one group."""
    checker: Literal["auto", "math-verify", "plain"] = "auto"
    """Compares answers: math-verify, or plain numbers and strings; auto takes what is there."""
    checker_seconds: Float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Most time for comparing the answers of one step, or of 16 problems of an evaluation; and for
    the votes of an evaluation. What is not decided by then counts as wrong (`undecided` in the
    metrics); among votes, as different."""


class JsonlTaskConfig(DatasetTaskConfig):
    """Problems in files with one JSON object a line."""

    name: Literal["jsonl"] = "jsonl"
    splits: NamedSplits[InputFile] | HashedSplits[InputFile]
    """The files, one for each split (train, dev, test) or one for `all`."""


class HubTaskConfig(DatasetTaskConfig):
    """Problems of a data set of the Hugging Face Hub, or of one in a local folder."""

    name: Literal["hub"] = "hub"
    path: NearbyName
    """The data set's name on the Hub, or a folder: one that `save_to_disk` wrote, or of data files
    that the datasets library reads."""
    config: str | None = None
    """Which configuration of the data set, where it has several."""
    revision: str | None = None
    """Which commit or tag; name one, and the problems can never change."""
    streaming: bool = False
    """Reads rows over the network as they are needed (see `limit`) and keeps nothing on disk."""
    splits: NamedSplits[str] | HashedSplits[str]
    """Splits of the data set: one for each of train, dev, test, or one for `all`."""


class PythonTaskConfig(Cut):
    """Problems and a reward in a Python file of your own; see docs/your-own-task.md."""

    name: Literal["python"] = "python"
    file: InputFile
    """The file. It is run as a program is: name only files that you trust."""
    correct_from: Float = 1.0
    """Rewards from this on count as right, in Pass@k, Maj@k and Avg@k and for `peer`."""
    instruction: str = ""
    """Said after each question, to student and teacher alike."""
    answer_forms: AnswerForms = ANSWER_FORMS
    """How a response gives its answer, for the votes of Maj@k (see the jsonl task)."""


def _arithmetic_unless_named(task: Any) -> Any:
    return {"name": "arithmetic", **task} if isinstance(task, dict) else task


TaskConfig = Annotated[
    Annotated[
        ArithmeticTaskConfig | JsonlTaskConfig | HubTaskConfig | PythonTaskConfig,
        Field(discriminator="name"),
    ],
    BeforeValidator(_arithmetic_unless_named),
]
