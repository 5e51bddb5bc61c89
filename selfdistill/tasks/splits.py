"""Lists of problems, and how one list is cut into train, dev and test."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence

from selfdistill.config import Counts, Cut, Shares
from selfdistill.tasks.interface import SPLITS, Problem, TaskError


class ProblemList:
    """The problems of a task that has them all at hand; a part of `Task`.

    Args:
        splits: the problems of each split, without overlap.
    """

    name: str

    def __init__(self, splits: Mapping[str, Sequence[Problem]]) -> None:
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
                f"{self.size(split)}: ask for fewer, or give it more"
            )
        order = list(self._splits[split])
        random.Random(f"{split}/{seed}").shuffle(order)
        return order[:count]


def cut_problems(problems: Sequence[Problem], cut: Cut) -> dict[str, list[Problem]]:
    """Cut problems that come together into splits, by shares or by counts.

    Raises:
        TaskError: there are fewer than the counts ask for.
    """
    if cut.counts is None:
        return split_by_hash(problems, cut.shares)
    return split_by_count(problems, cut.counts)


def split_by_count(problems: Sequence[Problem], counts: Counts) -> dict[str, list[Problem]]:
    """Give dev, then test, then train their numbers of problems, in the order of their hashes.

    Raises:
        TaskError: there are fewer.
    """
    least = counts.dev + counts.test + (counts.train or 1)
    if len(problems) < least:
        raise TaskError(
            f"there are {len(problems)} problems, but the counts of the splits ask for {least} "
            f"(dev {counts.dev}, test {counts.test}, train {counts.train or 'at least 1'}): lower "
            "them, or give more problems"
        )
    order = sorted(problems, key=lambda problem: _digest(problem.id))
    ends = (counts.dev, counts.dev + counts.test)
    train = order[ends[1] :][: counts.train]
    return {"train": train, "dev": order[: ends[0]], "test": order[ends[0] : ends[1]]}


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


def question_id(question: str) -> str:
    """Return the identifier of a question that comes without one: a hash of its words."""
    return _digest(" ".join(question.split()))[:16]


def question_key(problem: Problem) -> str:
    """What two problems with the same question have in common: its words."""
    return " ".join(problem.question.split())


def refuse_overlap(splits: Mapping[str, Sequence[Problem]], *, place: str, together: str) -> None:
    """Make sure that no question is in two splits.

    Args:
        splits: the problems of each.
        place: where they come from, for the message: a setting, or a line of a file.
        together: how to give all problems without a split, for the message.

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
                    f"{place}: {split} and {other_split} overlap: problem {problem.id!r} of "
                    f"{split} asks the question of {other.id!r} of {other_split}. Remove one, or "
                    f"give all problems without a split ({together}) and let the hash of the ids "
                    "decide"
                )
            seen[key] = (split, problem)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
