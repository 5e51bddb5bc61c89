"""Which weights teach, and whether they may share the student's prefix.

Every strategy is one small class behind `Teacher`. Sharing the keys and values of the common prefix
between student and teacher is exact only when both have the same weights at that step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

import torch

from selfdistill.config import TeacherConfig


class Teacher(Protocol):
    """A teacher strategy: the weights that score the student's rollouts.

    A strategy whose weights do not move by themselves has no state, and inherits the methods that
    do nothing.

    Attributes:
        name: as written in a configuration.
        has_student_weights: True when its weights are the student's current ones, bit for bit: only
            then may it borrow the student's prefix keys and values.
    """

    name: str
    has_student_weights: bool

    @property
    def model(self) -> torch.nn.Module | None:
        """Weights of its own; None when it reads the student's."""
        return None

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """Float32 tensors that a checkpoint must hold, by name; empty for most."""
        return {}

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return a context in which the yielded model has the teacher's weights."""
        ...

    def update(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Follow the student after an optimiser step; `masters` are its float32 weights."""
        return

    def refresh(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Become the student, where the configuration says that it is time."""
        return

    def publish(self) -> None:
        """Put `state`, which a checkpoint has changed, to use."""
        return

    def hold_float32(self) -> None:
        """Let `model` hold `state` itself, for FSDP2, which rounds weights as it gathers them."""
        return


class LiveTeacher(Teacher):
    """The student itself, with today's weights and without gradient."""

    name = "live"
    has_student_weights = True

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return the student."""
        return nullcontext(student)


class BaseTeacher(Teacher):
    """The fixed base model, as in the paper: a frozen copy, or the student without its adapters.

    Args:
        model: the frozen copy, which is put in eval mode without gradients; None turns the
            student's PEFT adapters off instead, which needs no second set of weights.
    """

    name = "base"
    has_student_weights = False
    model: torch.nn.Module | None = None

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        self.model = model.requires_grad_(False).eval() if model is not None else None

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return the frozen copy, or the student with its adapters disabled.

        Raises:
            ValueError: no copy was given and the student has no PEFT adapters to turn off, or the
                copy is the student itself.
        """
        if self.model is student:
            raise ValueError(
                "model is the student itself, which training changes: pass a deep copy, or use "
                "LiveTeacher"
            )
        if self.model is not None:
            return nullcontext(self.model)
        if not hasattr(student, "disable_adapter"):
            raise ValueError(
                f"the student is a {type(student).__name__} without PEFT adapters, so the base "
                "model is not in it: pass BaseTeacher(frozen_copy) or train adapters with peft"
            )
        return _adapters_disabled(student)


def build_teacher(
    config: TeacherConfig | None,
    student: torch.nn.Module,
    *,
    base: torch.nn.Module | None = None,
    own_frozen: bool = False,
) -> Teacher | None:
    """Return the configured teacher of a student that has not learned anything yet.

    Args:
        config: names the strategy; None for a method without a teacher.
        student: the model that learns.
        base: the model as it was before, for a student without adapters that has learned already.
        own_frozen: see `selfdistill.model.following_teacher.FollowingTeacher`.
    """
    if config is None:
        return None
    match config.name:
        case "live":
            return LiveTeacher()
        case "ema":
            from selfdistill.model.following_teacher import EmaTeacher

            return EmaTeacher(student, decay=config.decay, own_frozen=own_frozen)
        case "refreshed":
            from selfdistill.model.following_teacher import RefreshedTeacher

            return RefreshedTeacher(student, own_frozen=own_frozen)
        case "base" if hasattr(student, "disable_adapter"):
            return BaseTeacher()
        case "base":
            return BaseTeacher(base if base is not None else copy.deepcopy(student))


@contextmanager
def _adapters_disabled(student: torch.nn.Module) -> Iterator[torch.nn.Module]:
    disable_adapter = cast(Callable[[], AbstractContextManager[None]], student.disable_adapter)
    with disable_adapter():
        yield student
