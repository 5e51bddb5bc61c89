"""Which weights teach, and whether they may share the student's prefix.

Every strategy is one small class behind `Teacher`. Sharing the keys and values of the common prefix
between student and teacher is exact only when both have the same weights at that step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

import torch


class Teacher(Protocol):
    """A teacher strategy: the weights that score the student's rollouts.

    Attributes:
        name: as written in a configuration.
        has_student_weights: True when its weights are the student's current ones, bit for bit: only
            then may it borrow the student's prefix keys and values.
    """

    name: str
    has_student_weights: bool

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return a context in which the yielded model has the teacher's weights."""
        ...


class LiveTeacher:
    """The student itself, with today's weights and without gradient."""

    name = "live"
    has_student_weights = True

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return the student."""
        return nullcontext(student)


class BaseTeacher:
    """The fixed base model, as in the paper: a frozen copy, or the student without its adapters.

    Args:
        model: the frozen copy, which is put in eval mode without gradients; None turns the
            student's PEFT adapters off instead, which needs no second set of weights.
    """

    name = "base"
    has_student_weights = False

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self._model = model.requires_grad_(False).eval() if model is not None else None

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return the frozen copy, or the student with its adapters disabled.

        Raises:
            ValueError: no copy was given and the student has no PEFT adapters to turn off, or the
                copy is the student itself.
        """
        if self._model is student:
            raise ValueError(
                "model is the student itself, which training changes: pass a deep copy, or use "
                "LiveTeacher"
            )
        if self._model is not None:
            return nullcontext(self._model)
        if not hasattr(student, "disable_adapter"):
            raise ValueError(
                f"the student is a {type(student).__name__} without PEFT adapters, so the base "
                "model is not in it: pass BaseTeacher(frozen_copy) or train adapters with peft"
            )
        return _adapters_disabled(student)


@contextmanager
def _adapters_disabled(student: torch.nn.Module) -> Iterator[torch.nn.Module]:
    disable_adapter = cast(Callable[[], AbstractContextManager[None]], student.disable_adapter)
    with disable_adapter():
        yield student
