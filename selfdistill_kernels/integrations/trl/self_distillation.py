"""TRL's SDPOTrainer and SDFTTrainer with the fused distillation loss."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from trl.experimental import sdft, sdpo

from selfdistill_kernels.integrations.head_loss import fused_head_distillation
from selfdistill_kernels.integrations.heads import head_of, last_hidden_states
from selfdistill_kernels.integrations.module import redirected, teacher_states
from selfdistill_kernels.integrations.trl.refusals import can_check_heads, refuse, refuse_hosts
from selfdistill_kernels.loss import DistillationOutput
from selfdistill_kernels.objective import Objective

if TYPE_CHECKING:  # the two hosts have the same methods
    Host: TypeAlias = Any
else:
    Host = object


class _FusedSelfDistillation(Host):
    """What the two trainers share; comes before one of them in the order of classes.

    Attributes:
        workspace: "auto" or bytes of logits at a time (`fused_head_distillation`); a class or an
            instance may have its own.
    """

    workspace: str | int = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_hosts(self)
        if self.use_teacher_server:
            refuse(
                "args.use_teacher_server", "log-probs of a server are not supported",
                "set it to False, or use TRL's own trainer",
            )  # fmt: skip
        check = can_check_heads(self)
        self._student_head = head_of(self.accelerator.unwrap_model(self.model), check=check)
        self._teacher_head = head_of(self.accelerator.unwrap_model(self.teacher_model), check=check)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The distillation loss; student and loss run inside the forward of whatever wraps them.

        Raises:
            ValueError: return_outputs, as in TRL.
        """
        if return_outputs:
            raise ValueError(f"The {type(self).__name__} does not support returning outputs")
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with redirected(student, partial(self._loss_in_forward, student, inputs)):
            loss, mean = model()
        # Other ranks are asked outside of the forward, which they may leave at other times.
        mode = "train" if model.training else "eval"
        self._log_self_distillation_metric(mode, self.accelerator.gather(mean).mean().item())
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1.0)

    @torch.compiler.disable(
        recursive=False
    )  # models and loss are compiled, and not what joins them
    def _loss_in_forward(self, student: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss, and TRL's metric: the mean of the tokens' losses."""
        targets, completion_mask = inputs["completion_ids"], inputs["completion_mask"]
        exists = self._loss_mask(inputs)
        length = targets.shape[1]
        old = inputs.get("old_per_token_logps") if self.args.distillation_is_clip else None
        with self.accelerator.autocast():
            student_hidden = last_hidden_states(
                student,
                input_ids=torch.cat([inputs["prompt_ids"], targets], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            )
            with torch.no_grad(), self._get_teacher_context_for_self_distillation():
                teacher = self.accelerator.unwrap_model(
                    self.teacher_model, keep_torch_compile=False
                )
                read = {
                    "input_ids": inputs["teacher_input_ids"],
                    "attention_mask": inputs["teacher_attention_mask"],
                }
                # The student's own forward is under way, and is that of a teacher that it is.
                if teacher is student:
                    teacher_hidden = last_hidden_states(student, **read)
                else:
                    teacher_hidden = teacher_states(self.teacher_model, teacher, **read)
                teacher_head = self._teacher_head.values
            objective = self._objective(clipped=old is not None)
            output = fused_head_distillation(
                _completion(student_hidden, length),
                _completion(teacher_hidden, length),
                self._student_head,
                teacher_head,
                targets,
                mask=exists,
                old_logprobs=old,
                objective=objective,
                temperature=self.temperature,
                reduction="sequence_mean",
                workspace=self.workspace,
            )
        losses = _token_losses(objective, output, old)
        return output.loss, (losses * exists).sum() / exists.sum().clamp(min=1)

    @abstractmethod
    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        """[batch, length] bool, the tokens of the completions that carry the loss."""

    def _objective(self, *, clipped: bool) -> Objective:
        """Return the objective that TRL's configuration asks for."""
        args = self.args
        clip = args.distillation_is_clip if clipped else None
        if args.distillation_mode == "sampled_token":
            return Objective("none", policy_gradient=1.0, importance_clip=clip)
        top_k = args.distillation_topk if args.distillation_mode == "topk_logits" else None
        return Objective(
            "jsd", beta=args.distillation_alpha, importance_clip=clip, top_k=top_k,
            tail=args.distillation_add_tail,
        )  # fmt: skip


class SDPOTrainer(_FusedSelfDistillation, sdpo.SDPOTrainer):
    """`trl.experimental.sdpo.SDPOTrainer`, whose arguments it takes.

    Raises:
        ValueError: distillation_weight other than 1, use_teacher_server, DeepSpeed.
        UnsupportedHeadError: a head that the fused loss does not know.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.distillation_weight != 1.0:
            refuse(
                "args.distillation_weight",
                f"{self.args.distillation_weight} mixes in a policy loss of materialised logits, "
                "which is not computed",
                "set it to 1.0, or use TRL's own trainer",
            )

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        chosen = inputs.get("self_distillation_mask")
        exists = inputs["completion_mask"] != 0
        return exists if chosen is None else exists & (chosen[:, None] != 0)


class SDFTTrainer(_FusedSelfDistillation, sdft.SDFTTrainer):
    """`trl.experimental.sdft.SDFTTrainer`, whose arguments it takes.

    Raises:
        ValueError: use_teacher_server, DeepSpeed.
        UnsupportedHeadError: a head that the fused loss does not know.
    """

    def _loss_mask(self, inputs: dict[str, Any]) -> Tensor:
        exists = inputs["completion_mask"] != 0
        position = torch.arange(exists.shape[1], device=exists.device)
        return exists & (position >= self.num_loss_tokens_to_skip)


def _completion(hidden: Tensor, length: int) -> Tensor:
    """[batch, length, H]: the states that predict the last `length` tokens."""
    return hidden[:, :-1][:, -length:]


def _token_losses(objective: Objective, output: DistillationOutput, old: Tensor | None) -> Tensor:
    """[batch, length] losses of the tokens, for the log."""
    student = output.student_logprob
    assert student is not None
    assert output.advantage is not None
    losses = output.divergence - objective.policy_gradient * output.advantage * student
    if old is None or objective.importance_clip is None:
        return losses
    return losses * (student - old).exp().clamp(max=objective.importance_clip)
