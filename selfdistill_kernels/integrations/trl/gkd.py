"""TRL's GKDTrainer with the fused divergence."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental import gkd

from selfdistill_kernels.integrations.head_loss import fused_head_distillation
from selfdistill_kernels.integrations.heads import head_of, last_hidden_states
from selfdistill_kernels.integrations.module import aligned, redirected, teacher_states
from selfdistill_kernels.integrations.trl.refusals import can_check_heads, refuse, refuse_hosts
from selfdistill_kernels.objective import Objective


class GKDTrainer(gkd.GKDTrainer):
    """`trl.experimental.gkd.GKDTrainer`, whose arguments it takes.

    As in TRL, `temperature` is that of sampling only, and the divergence has temperature 1.

    Attributes:
        workspace: "auto" or bytes of logits at a time (`fused_head_distillation`); a class or an
            instance may have its own.

    Raises:
        ValueError: compute_metrics (there are no logits), DeepSpeed or a vision-language model.
        UnsupportedHeadError: a head that the fused loss does not know.
    """

    workspace: str | int = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_hosts(self)
        if self.compute_metrics is not None:
            refuse(
                "compute_metrics", "logits to measure are not made",
                "leave it out, or use TRL's own trainer",
            )  # fmt: skip
        check = can_check_heads(self)
        self._student_head = head_of(self.accelerator.unwrap_model(self.model), check=check)
        self._teacher_head = head_of(self.accelerator.unwrap_model(self.teacher_model), check=check)
        self._objective = Objective("jsd", beta=self.beta)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The loss, with return_outputs beside {"loss": loss}; model and loss run inside the
        forward of whatever wraps the student."""
        student = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        run = partial(self._loss_in_forward, student, inputs, num_items_in_batch)
        with redirected(student, run):
            loss: Tensor = model()
        return (loss, {"loss": loss}) if return_outputs else loss

    @torch.compiler.disable(
        recursive=False
    )  # models and loss are compiled, and not what joins them
    def _loss_in_forward(
        self, student: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> Tensor:
        read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        self.teacher_model.eval()
        with self.accelerator.autocast():
            hidden = last_hidden_states(student, **read)
            with torch.no_grad():
                teacher = self.accelerator.unwrap_model(
                    self.teacher_model, keep_torch_compile=False
                )
                teacher_hidden = teacher_states(self.teacher_model, teacher, **read)
            hidden, teacher_hidden, targets = aligned(
                hidden, inputs["labels"], teacher_hidden, None
            )
            return fused_head_distillation(
                hidden,
                teacher_hidden,
                self._student_head,
                self._teacher_head,
                targets,
                objective=self._objective,
                normalizer=num_items,
                workspace=self.workspace,
            ).loss
