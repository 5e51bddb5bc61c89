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

    Attributes:
        name: as written in a configuration.
        has_student_weights: True when its weights are the student's current ones, bit for bit: only
            then may it borrow the student's prefix keys and values.
        state: float32 tensors that a checkpoint must hold, by name; empty for most.
    """

    name: str
    has_student_weights: bool
    state: Mapping[str, torch.Tensor]

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return a context in which the yielded model has the teacher's weights."""
        ...

    def update(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Follow the student after an optimiser step; `masters` are its float32 weights."""
        ...

    def publish(self) -> None:
        """Put `state`, which a checkpoint has changed, to use."""
        ...


class _Unchanging:
    """What the strategies without weights of their own have in common."""

    state: Mapping[str, torch.Tensor] = {}

    def update(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Do nothing."""

    def publish(self) -> None:
        """Do nothing."""


class LiveTeacher(_Unchanging):
    """The student itself, with today's weights and without gradient."""

    name = "live"
    has_student_weights = True

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return the student."""
        return nullcontext(student)


class BaseTeacher(_Unchanging):
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


class EmaTeacher:
    """The exponential moving average of the trained weights (with LoRA: of the adapters only).

    After every optimiser step `state[n] = decay * state[n] + (1 - decay) * masters[n]` in float32,
    starting from the student's weights. The model reads them rounded to its own dtype.

    Args:
        student: its parameters that require a gradient are averaged.
        decay: how much of the average stays in one step, between 0 and 1.
    """

    name = "ema"
    has_student_weights = False

    def __init__(self, student: torch.nn.Module, *, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"decay is {decay}, expected a number between 0 and 1, both excluded: use "
                "LiveTeacher for 0 and BaseTeacher for 1"
            )
        self.decay = decay
        self.state: Mapping[str, torch.Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        }
        # The very tensors of `state` where the model computes in float32.
        self._parameters = {
            name: torch.nn.Parameter(self.state[name].to(parameter.dtype), requires_grad=False)
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Move the average towards the student's float32 weights of this step."""
        for name, average in self.state.items():
            average.lerp_(masters[name], 1 - self.decay)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the average into the parameters that the model reads."""
        for name, average in self.state.items():
            if self._parameters[name].dtype != average.dtype:
                self._parameters[name].copy_(average)

    @contextmanager
    def weights(self, student: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Return the student with the averages in place of its parameters.

        The parameters are exchanged, not overwritten, so what autograd has saved of the student's
        own pass stays valid.
        """
        averages = {
            id(parameter): self._parameters[name]
            for name, parameter in student.named_parameters()
            if name in self._parameters
        }
        # A tied weight sits in several modules.
        places = [
            (module, name, parameter)
            for module in student.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in averages
        ]
        for module, name, parameter in places:
            setattr(module, name, averages[id(parameter)])
        try:
            yield student
        finally:
            for module, name, parameter in places:
                setattr(module, name, parameter)


def build_teacher(
    config: TeacherConfig | None,
    student: torch.nn.Module,
    *,
    base: torch.nn.Module | None = None,
) -> Teacher | None:
    """Return the configured teacher of a student that has not learned anything yet.

    Args:
        config: names the strategy; None for a method without a teacher.
        student: the model that learns.
        base: the model as it was before, for a student without adapters that has learned already.
    """
    if config is None:
        return None
    match config.name:
        case "live":
            return LiveTeacher()
        case "ema":
            return EmaTeacher(student, decay=config.decay)
        case "base" if hasattr(student, "disable_adapter"):
            return BaseTeacher()
        case "base":
            return BaseTeacher(base if base is not None else copy.deepcopy(student))


@contextmanager
def _adapters_disabled(student: torch.nn.Module) -> Iterator[torch.nn.Module]:
    disable_adapter = cast(Callable[[], AbstractContextManager[None]], student.disable_adapter)
    with disable_adapter():
        yield student
