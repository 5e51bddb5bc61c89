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
    """

    name: str
    has_student_weights: bool

    @property
    def model(self) -> torch.nn.Module | None:
        """Weights of its own; None when it reads the student's."""
        ...

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """Float32 tensors that a checkpoint must hold, by name; empty for most."""
        ...

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return a context in which the yielded model has the teacher's weights."""
        ...

    def update(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Follow the student after an optimiser step; `masters` are its float32 weights."""
        ...

    def publish(self) -> None:
        """Put `state`, which a checkpoint has changed, to use."""
        ...

    def hold_float32(self) -> None:
        """Let `model` hold `state` itself, for FSDP2, which rounds weights as it gathers them."""
        ...


class _Unchanging:
    """What the strategies without a state have in common."""

    model: torch.nn.Module | None = None
    state: Mapping[str, torch.Tensor] = {}

    def update(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Do nothing."""

    def publish(self) -> None:
        """Do nothing."""

    def hold_float32(self) -> None:
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


class EmaTeacher:
    """The exponential moving average of the trained weights (with LoRA: of the adapters only).

    After every optimiser step `state[n] = decay * state[n] + (1 - decay) * masters[n]` in float32,
    starting from the student's weights. The model reads them rounded to its own dtype.

    Args:
        student: its parameters that require a gradient are averaged.
        decay: how much of the average stays in one step, between 0 and 1.
        own_frozen: copy the frozen parameters, too, instead of reading the student's.

    Attributes:
        model: a copy of the student with the averages in place of its trained parameters.
    """

    name = "ema"
    has_student_weights = False

    def __init__(self, student: torch.nn.Module, *, decay: float, own_frozen: bool = False) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"decay is {decay}, expected a number between 0 and 1, both excluded: use "
                "LiveTeacher for 0 and BaseTeacher for 1"
            )
        self.decay = decay
        trained = [name for name, p in student.named_parameters() if p.requires_grad]
        kept = () if own_frozen else (p for p in student.parameters() if not p.requires_grad)
        self.model = copy.deepcopy(student, {id(p): p for p in kept}).requires_grad_(False)
        self._averaged = frozenset(trained)
        # Of the parameters that the model does not hold in float32 itself.
        self._float32 = {
            name: parameter.float()
            for name, parameter in self._parameters().items()
            if parameter.dtype != torch.float32
        }

    def _parameters(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {name: p.detach() for name, p in named if name in self._averaged}

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """The averages, float32."""
        return self._parameters() | self._float32

    def hold_float32(self) -> None:
        """Let the model hold the averages themselves: FSDP2 rounds as it gathers."""
        for name, parameter in self.model.named_parameters():
            if name in self._float32:
                parameter.data = self._float32.pop(name)

    @torch.no_grad()
    def update(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Move the average towards the student's float32 weights of this step."""
        for name, average in self.state.items():
            average.lerp_(masters[name], 1 - self.decay)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the average into the parameters that the model reads."""
        parameters = self._parameters()
        for name, average in self._float32.items():
            parameters[name].copy_(average)

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return the copy with the averages."""
        return nullcontext(self.model)


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
        own_frozen: see `EmaTeacher`.
    """
    if config is None:
        return None
    match config.name:
        case "live":
            return LiveTeacher()
        case "ema":
            return EmaTeacher(student, decay=config.decay, own_frozen=own_frozen)
        case "base" if hasattr(student, "disable_adapter"):
            return BaseTeacher()
        case "base":
            return BaseTeacher(base if base is not None else copy.deepcopy(student))


@contextmanager
def _adapters_disabled(student: torch.nn.Module) -> Iterator[torch.nn.Module]:
    disable_adapter = cast(Callable[[], AbstractContextManager[None]], student.disable_adapter)
    with disable_adapter():
        yield student
