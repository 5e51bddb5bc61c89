"""What the self-distillation methods share: a fused loss, from hidden states of the completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from selfdistill.config import ConfigError, Distillation, LossConfig
from selfdistill.critic.interface import Critic
from selfdistill.methods.method import Contexts, Method
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import LMHead, UnsupportedHeadError
from selfdistill.model.scoring import ScoredTokens
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import SteppedTask, StepTask, Task
from selfdistill_kernels import AdvantageMask, DistillationOutput, Objective
from selfdistill_kernels.integrations import HeadValues, fused_head_distillation


def distillation_method(
    settings: Distillation,
    task: Task,
    contexts: Callable[[Sequence[Attempts]], Contexts],
    *,
    critic: Critic | None = None,
) -> Method:
    """Return a method whose student follows a self-teacher, which sees `contexts`.

    Args:
        settings: of the method; the loss and the number of rollouts are among them.
        task: must know the steps of a response where the loss asks for them.
        contexts: see `Method`.
        critic: who writes them, if somebody does.

    Raises:
        ConfigError: the loss asks for steps that the task does not know.
    """
    mask, stops = settings.loss.advantage_mask, settings.loss.stop_after_first_wrong_step
    per_step = mask is not None and mask.per_step
    for name, is_set, ability in (
        ("advantage_mask.per_step", per_step, StepTask),
        ("stop_after_first_wrong_step", stops, SteppedTask),
    ):
        if is_set and not isinstance(task, ability):
            raise ConfigError(
                f"method.loss.{name} is set, but the task {task.name!r} does not know the steps of "
                f"a response: leave it out, or let the task implement `{ability.__name__}`"
            )
    return Method(
        settings.name,
        settings.group_size,
        DistillationLoss(settings.loss),
        contexts,
        needs_steps=per_step,
        stops_at_wrong_step=stops,
        critic=critic,
    )


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
            divergence_clip=config.divergence_clip,
            entry_clip=config.entry_clip,
            importance_clip=config.importance_clip,
        )
        mask = config.advantage_mask
        self.advantage_mask = None if mask is None else AdvantageMask(**mask.model_dump())
        self.token_selection = config.token_selection
        self.temperature = config.temperature
        self.teacher_temperature = config.teacher_temperature
        self.needs_old_logprobs = config.importance_clip is not None
        self.gradient_tolerance = config.gradient_tolerance
        self.sequence_mean = config.reduction == "sequence_mean"
        self.position_weight = config.position_weight

    def denominator(self, group: PromptGroup) -> int:
        """Return the tokens of the group; its rollouts when every rollout counts the same."""
        return len(group.completions) if self.sequence_mean else group.num_tokens

    def learns_from(self, group: PromptGroup) -> bool:
        """Return True: only scoring shows where teacher and student differ."""
        return True

    def __call__(
        self,
        scored: ScoredTokens,
        student: LMHead,
        teacher: LMHead,
        *,
        normalizer: float,
        mask: Tensor | None = None,
    ) -> DistillationOutput:
        """Return the sum over tokens divided by `normalizer` (see `denominator`).

        Every token is judged by its own rollout, so the result does not depend on which groups are
        scored together.

        Args:
            scored, student, teacher, normalizer: see `Loss`.
            mask: [T] bool, the tokens that are compared at all; None: all of them.

        Raises:
            ValueError: no teacher has scored the tokens, or something else that the configuration
                needs (sampling log-probs, steps) is missing.
            UnsupportedHeadError: a sharper teacher whose model caps its logits.
        """
        if scored.teacher_hidden is None:
            raise ValueError("scored.teacher_hidden is missing: score the groups with a teacher")
        per_step = self.advantage_mask is not None and self.advantage_mask.per_step
        fused = partial(
            fused_head_distillation,
            scored.student_hidden,
            scored.teacher_hidden,
            student,
            self._sharpened(teacher),
            scored.targets,
            mask=mask,
            token_weight=self._token_weights(scored),
            old_logprobs=scored.old_logprobs if self.objective.importance_clip else None,
            objective=self.objective,
            temperature=self.temperature,
            normalizer=normalizer,
            gradient_tolerance=self.gradient_tolerance,
        )
        if self.token_selection is not None:
            from selfdistill.methods.selection import selected_loss

            return selected_loss(
                self.token_selection,
                scored,
                fused,
                student,
                temperature=self.temperature,
                mask=mask,
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
        if mask is not None:
            kept &= mask
        return replace(output, loss=fused(mask=kept).loss, active=kept)

    def _sharpened(self, teacher: LMHead) -> LMHead | HeadValues:
        """Return the teacher's head with its logits divided by `teacher_temperature`."""
        if self.teacher_temperature == 1.0:
            return teacher
        if teacher.softcap is not None:
            raise UnsupportedHeadError(
                "method.loss.teacher_temperature: this model caps its logits, which are divided "
                "before the cap only; leave it at 1"
            )
        scale = teacher.logit_scale / self.teacher_temperature
        return replace(teacher.values, logit_scale=scale)

    def _token_weights(self, scored: ScoredTokens) -> Tensor | None:
        """[T] what each token's loss is multiplied with; None: 1."""
        weights = None
        if self.sequence_mean:  # one over the length of each token's rollout
            weights = (1.0 / scored.rollout_index.bincount())[scored.rollout_index]
        if self.position_weight is None:
            return weights
        from selfdistill.methods.position_weights import position_weights

        by_place = position_weights(self.position_weight, scored.positions)
        return by_place if weights is None else weights * by_place


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
