"""The loss of the self-distillation methods: fused, from hidden states, on completion tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from selfdistill.attention import base_causal_lm
from selfdistill.config import LossConfig
from selfdistill.layout import PromptGroup
from selfdistill.scoring import ScoredTokens
from selfdistill_kernels import (
    AdvantageMask,
    DistillationOutput,
    Objective,
    fused_linear_distillation,
)


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: cap(scale * (h W^T + b)).

    Attributes:
        weight: [V, H], the model's own parameter; with tied embeddings it is those, too.
        bias: [V] or None.
        softcap: c of c * tanh(logits / c), or None.
        logit_scale: multiplies the logits before the cap.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


class UnsupportedHeadError(ValueError):
    """The model makes its logits in a way that the fused loss does not know."""


def lm_head(model: torch.nn.Module) -> Head:
    """Find a model's head and make sure that it is all there is between hidden states and logits.

    Raises:
        UnsupportedHeadError: the model's own logits differ from what the head gives.
    """
    base = base_causal_lm(model)
    layer = base.get_output_embeddings()
    config = base.get_decoder().config
    head = Head(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=_logit_scale(config),
    )
    with torch.no_grad():
        ids = torch.arange(1, 5, device=base.device)[None] % head.weight.shape[0]
        expected = base(input_ids=ids, use_cache=False).logits
        hidden = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        error = ((logits - expected).abs().max() / expected.abs().max()).item()
    tolerance = 1e-3 if base.dtype == torch.float32 else 5e-2
    if not error <= tolerance:
        raise UnsupportedHeadError(
            f"{type(base).__name__} does not make its logits by lm_head, scale and soft cap alone: "
            f"they differ by {error:.1e} (relative), expected at most {tolerance:.0e}"
        )
    return head


def _logit_scale(config: object) -> float:
    """Cohere multiplies the logits by `logit_scale`, Granite divides them by `logits_scaling`."""
    return float(getattr(config, "logit_scale", 1.0)) / float(
        getattr(config, "logits_scaling", 1.0)
    )


class Loss(Protocol):
    """Turns scored tokens into a loss and per-token statistics."""

    def denominator(self, group: PromptGroup) -> int:
        """Return what a group adds to the denominator of the step's mean loss."""
        ...

    def learns_from(self, group: PromptGroup) -> bool:
        """Return False when the group has no gradient whatever the models say about it."""
        ...

    def __call__(
        self, scored: ScoredTokens, student: Head, teacher: Head, *, normalizer: float
    ) -> DistillationOutput:
        """Return the sum over tokens divided by `normalizer`.

        Args:
            scored: the tokens of whole groups.
            student, teacher: the heads; without a teacher the second one is not looked at.
            normalizer: the sum of the denominators of all groups of the step.
        """
        ...


class DistillationLoss:
    """A divergence between the student's and the self-teacher's next-token distributions.

    Args:
        config: which divergence, which tokens, at which temperature.
    """

    def __init__(self, config: LossConfig) -> None:
        objective = config.objective
        if objective.name == "jsd":
            self.objective = Objective("jsd", beta=objective.beta)
        else:
            self.objective = Objective(objective.name)
        mask = config.advantage_mask
        self.advantage_mask = None if mask is None else AdvantageMask(**mask.model_dump())
        self.temperature = config.temperature

    def denominator(self, group: PromptGroup) -> int:
        """Return the tokens of the group."""
        return group.num_tokens

    def learns_from(self, group: PromptGroup) -> bool:
        """Return True: only scoring shows where teacher and student differ."""
        return True

    def __call__(
        self, scored: ScoredTokens, student: Head, teacher: Head, *, normalizer: float
    ) -> DistillationOutput:
        """Return the sum over tokens divided by `normalizer` (the tokens of the whole step).

        Raises:
            ValueError: no teacher has scored the tokens.
        """
        if scored.teacher_hidden is None:
            raise ValueError("scored.teacher_hidden is missing: score the groups with a teacher")
        shared = teacher.weight is student.weight
        return fused_linear_distillation(
            scored.student_hidden,
            scored.teacher_hidden,
            student.weight,
            scored.targets,
            bias=student.bias,
            teacher_weight=None if shared else teacher.weight,
            teacher_bias=None if shared else teacher.bias,
            objective=self.objective,
            advantage_mask=self.advantage_mask,
            temperature=self.temperature,
            logit_scale=student.logit_scale,
            softcap=student.softcap,
            normalizer=normalizer,
        )
