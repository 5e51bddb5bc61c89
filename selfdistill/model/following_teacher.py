"""Teachers with weights of their own that follow the student: an average, or a copy made anew."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch


class FollowingTeacher:
    """Trained weights of its own (with LoRA: adapters only), which start as the student's.

    They are float32; the model reads them rounded to its own dtype.

    Args:
        student: its parameters that require a gradient are copied.
        own_frozen: copy the frozen parameters, too, instead of reading the student's.

    Attributes:
        model: a copy of the student with these weights in place of its trained parameters.
    """

    has_student_weights = False

    def __init__(self, student: torch.nn.Module, *, own_frozen: bool = False) -> None:
        trained = [name for name, p in student.named_parameters() if p.requires_grad]
        kept = () if own_frozen else (p for p in student.parameters() if not p.requires_grad)
        self.model = copy.deepcopy(student, {id(p): p for p in kept}).requires_grad_(False)
        self._followed = frozenset(trained)
        # Of the parameters that the model does not hold in float32 itself.
        self._float32 = {
            name: parameter.float()
            for name, parameter in self._parameters().items()
            if parameter.dtype != torch.float32
        }

    def _parameters(self) -> dict[str, torch.Tensor]:
        named = self.model.named_parameters()
        return {name: p.detach() for name, p in named if name in self._followed}

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """The trained weights, float32."""
        return self._parameters() | self._float32

    def hold_float32(self) -> None:
        """Let the model hold the float32 weights themselves: FSDP2 rounds as it gathers."""
        for name, parameter in self.model.named_parameters():
            if name in self._float32:
                parameter.data = self._float32.pop(name)

    def update(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Follow the student after an optimiser step, by those that do."""

    def refresh(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Become the student, where the configuration says that it is time, by those that do."""

    @torch.no_grad()
    def publish(self) -> None:
        """Round the weights into the parameters that the model reads."""
        parameters = self._parameters()
        for name, weight in self._float32.items():
            parameters[name].copy_(weight)

    def weights(self, student: torch.nn.Module) -> AbstractContextManager[torch.nn.Module]:
        """Return the copy."""
        return nullcontext(self.model)


class EmaTeacher(FollowingTeacher):
    """The exponential moving average of the trained weights.

    After every optimiser step `state[n] = decay * state[n] + (1 - decay) * masters[n]` in float32.

    Args:
        student, own_frozen: see `FollowingTeacher`.
        decay: how much of the average stays in one step, between 0 and 1.
    """

    name = "ema"

    def __init__(self, student: torch.nn.Module, *, decay: float, own_frozen: bool = False) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"decay is {decay}, expected a number between 0 and 1, both excluded: use "
                "LiveTeacher for 0 and BaseTeacher for 1"
            )
        super().__init__(student, own_frozen=own_frozen)
        self.decay = decay

    @torch.no_grad()
    def update(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Move the average towards the student's float32 weights of this step."""
        for name, average in self.state.items():
            average.lerp_(masters[name], 1 - self.decay)
        self.publish()


class RefreshedTeacher(FollowingTeacher):
    """The student as it was at the last refresh: fixed in between, as the base model is.

    With a context it can be better than the base model is with one, so the student may go on where
    the base model has nothing left to teach.
    """

    name = "refreshed"

    @torch.no_grad()
    def refresh(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Copy the student's float32 weights of this step."""
        for name, weight in self.state.items():
            weight.copy_(masters[name])
        self.publish()
