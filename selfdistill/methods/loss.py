"""The loss of the self-distillation methods: fused, from hidden states, on completion tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, cast

import torch
from torch import Tensor

from selfdistill.config import LossConfig
from selfdistill.model.attention import base_causal_lm
from selfdistill.model.layout import PromptGroup
from selfdistill.model.scoring import ScoredTokens
from selfdistill.model.teacher import Teacher
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
        layer: holds W and b.
        softcap: c of c * tanh(logits / c), or None.
        logit_scale: multiplies the logits before the cap.
    """

    layer: torch.nn.Module
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def weight(self) -> Tensor:
        """[V, H], the model's own parameter; with tied embeddings it is those, too."""
        return cast(Tensor, self.layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """[V] or None."""
        return cast("Tensor | None", getattr(self.layer, "bias", None))


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
        layer=layer,
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


def find_heads(student: torch.nn.Module, teacher: Teacher | None) -> tuple[Head, Head]:
    """Return the heads of the student and of its teacher; without a teacher twice the student's.

    The weights of both change in place as training goes on.
    """
    own = lm_head(student)
    if teacher is None:
        return own, own
    with teacher.weights(student) as teacher_model:
        return own, lm_head(teacher_model)


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
        objective, top_k = config.objective, config.top_k
        self.objective = Objective(
            objective.name,
            beta=getattr(objective, "beta", 0.5),
            top_k=None if top_k is None else top_k.k,
            top_k_of="student" if top_k is None else top_k.of,
            tail=top_k is None or top_k.tail,
            divergence_clip=config.token_clip,
            importance_clip=config.importance_clip,
        )
        mask = config.advantage_mask
        self.advantage_mask = None if mask is None else AdvantageMask(**mask.model_dump())
        self.temperature = config.temperature
        self.sequence_mean = config.reduction == "sequence_mean"

    def denominator(self, group: PromptGroup) -> int:
        """Return the tokens of the group; its rollouts when every rollout counts the same."""
        return len(group.completions) if self.sequence_mean else group.num_tokens

    def learns_from(self, group: PromptGroup) -> bool:
        """Return True: only scoring shows where teacher and student differ."""
        return True

    def __call__(
        self, scored: ScoredTokens, student: Head, teacher: Head, *, normalizer: float
    ) -> DistillationOutput:
        """Return the sum over tokens divided by `normalizer` (see `denominator`).

        Every token is judged by its own rollout, so the result does not depend on which groups are
        scored together.

        Raises:
            ValueError: no teacher has scored the tokens, or something else that the configuration
                needs (sampling log-probs, steps) is missing.
        """
        if scored.teacher_hidden is None:
            raise ValueError("scored.teacher_hidden is missing: score the groups with a teacher")
        shared = teacher.weight is student.weight
        per_step = self.advantage_mask is not None and self.advantage_mask.per_step
        fused = partial(
            fused_linear_distillation,
            scored.student_hidden,
            scored.teacher_hidden,
            student.weight,
            scored.targets,
            bias=student.bias,
            teacher_weight=None if shared else teacher.weight,
            teacher_bias=None if shared else teacher.bias,
            token_weight=_sequence_weights(scored) if self.sequence_mean else None,
            old_logprobs=scored.old_logprobs if self.objective.importance_clip else None,
            objective=self.objective,
            temperature=self.temperature,
            logit_scale=student.logit_scale,
            softcap=student.softcap,
            normalizer=normalizer,
        )
        if self.advantage_mask is None or self.advantage_mask.top_fraction is None:
            return fused(
                advantage_mask=self.advantage_mask,
                step_ids=_unique_steps(scored) if per_step else None,
            )
        # The kernel would take the largest of all tokens at hand, whichever groups these are.
        with torch.no_grad():
            output = fused()
        assert output.advantage is not None
        kept = _select_by_rollout(self.advantage_mask, output.advantage, scored)
        return replace(output, loss=fused(mask=kept).loss, active=kept)


def _sequence_weights(scored: ScoredTokens) -> Tensor:
    """[T] one over the length of each token's rollout."""
    return (1.0 / scored.rollout_index.bincount())[scored.rollout_index]


def _unique_steps(scored: ScoredTokens) -> Tensor | None:
    """[T] step numbers below T that no two rollouts share, -1 outside of steps."""
    if scored.steps is None:
        return None
    first_token = torch.arange(len(scored.steps), device=scored.steps.device) - scored.positions
    return torch.where(scored.steps < 0, scored.steps, scored.steps + first_token)


def _select_by_rollout(mask: AdvantageMask, advantage: Tensor, scored: ScoredTokens) -> Tensor:
    """[T] bool, the tokens that the mask keeps of each rollout."""
    lengths = scored.rollout_index.bincount().tolist()
    steps = [None] * len(lengths) if scored.steps is None else scored.steps.split(lengths)
    return torch.cat(
        [
            mask.select(own, torch.ones_like(own, dtype=torch.bool), own_steps)
            for own, own_steps in zip(advantage.split(lengths), steps, strict=True)
        ]
    )
