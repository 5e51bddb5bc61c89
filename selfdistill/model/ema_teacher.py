"""The teacher that follows the student: an exponential moving average of its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch


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
