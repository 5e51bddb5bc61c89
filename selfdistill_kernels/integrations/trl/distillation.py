"""TRL's DistillationTrainer with the fused divergence."""

from __future__ import annotations

from typing import Any

import torch
import trl
from torch import Tensor, nn

from selfdistill_kernels.integrations.head_loss import fused_head_distillation
from selfdistill_kernels.integrations.heads import head_of
from selfdistill_kernels.integrations.trl.refusals import can_check_heads, refuse, refuse_hosts
from selfdistill_kernels.objective import Objective


class DistillationTrainer(trl.DistillationTrainer):
    """`trl.DistillationTrainer`, whose arguments it takes; only the loss is computed otherwise.

    As in TRL, bf16=True of the configuration does not cast a float32 model in the loss: load the
    models in bfloat16.

    Attributes:
        workspace: "auto" or bytes of logits at a time (`fused_head_distillation`); a class or an
            instance may have its own.

    Raises:
        ValueError: no local teacher, DeepSpeed, torch_compile or a vision-language model.
        UnsupportedHeadError: a quantised head, or one that is not all there is between hidden
            states and logits. TRL itself refuses adapters on the head.
    """

    workspace: str | int = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_hosts(self)
        if self.accelerator.state.dynamo_plugin.backend != "NO":
            refuse(
                "args.torch_compile", "TRL goes around what it has compiled, and around DDP with "
                "it, which is not mended",
                "leave it out, or use FusedLossTrainer or GKDTrainer",
            )  # fmt: skip
        if self.teacher_model is None:
            refuse(
                "teacher_model", "a teacher behind a server is not supported",
                "pass a model, or use TRL's own trainer",
            )  # fmt: skip
        check = can_check_heads(self)
        self._student_head = head_of(self.model, check=check)
        self._teacher_head = head_of(self.accelerator.unwrap_model(self.teacher_model), check=check)
        self._objective = Objective("jsd", beta=self.beta)

    def _compute_loss(
        self,
        unwrapped_student: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the summed entropy of the student, and the number of tokens; TRL calls it
        inside the forward of whatever wraps the student."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        read = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        exists = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
        length = exists.shape[1]
        student_hidden = self._get_last_hidden_state(unwrapped_student, ids, read, length)
        self.teacher_model.eval()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            teacher_hidden = self._forward_redirection(
                self.teacher_model, teacher, self._get_last_hidden_state, teacher, ids, read, length
            )
        output = fused_head_distillation(
            student_hidden,
            teacher_hidden,
            self._student_head,
            self._teacher_head,
            mask=exists,
            objective=self._objective,
            temperature=self.temperature,
            normalizer=num_items_in_batch,
            workspace=self.workspace,
        )
        return output.loss, output.entropy.sum(), exists.sum()
