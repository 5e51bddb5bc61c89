"""The Trainer of transformers with a fused loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from selfdistill_kernels.advantage import AdvantageMask
from selfdistill_kernels.integrations.module import ModelWithLoss, redirected
from selfdistill_kernels.objective import Objective

TEACHER_COLUMNS = ("teacher_input_ids", "teacher_attention_mask", "teacher_labels")


class FusedLossTrainer(Trainer):
    """`transformers.Trainer` whose loss is fused: cross entropy, or a distillation loss.

    Model and loss run inside the forward of whatever wraps the model, under the autocast of the
    training arguments, and are divided by `num_items_in_batch` as the Trainer's own loss is.

    Batches hold input_ids, attention_mask and labels as usual. With a teacher that sees more
    context they also hold teacher_input_ids, teacher_attention_mask and teacher_labels (see
    `ModelWithLoss`), which the collator has to pad.

    Args:
        args, kwargs: those of `transformers.Trainer`.
        teacher, objective, advantage_mask, temperature, workspace, backend: as in `ModelWithLoss`.
            The default is plain cross entropy, which needs no teacher.

    Raises:
        ValueError: an option that needs logits or another loss (compute_metrics,
            preprocess_logits_for_metrics, compute_loss_func, label_smoothing_factor), DeepSpeed, or
            nn.DataParallel.
        TypeError, ValueError, UnsupportedHeadError: what `ModelWithLoss` refuses.
    """

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | str = "live",
        objective: str | Objective = "cross_entropy",
        advantage_mask: AdvantageMask | None = None,
        temperature: float = 1.0,
        workspace: str | int = "auto",
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_options()
        if isinstance(teacher, nn.Module):
            teacher = teacher.to(self.args.device)
        self.model_with_loss = ModelWithLoss(
            self.model,
            teacher=teacher,
            objective=objective,
            advantage_mask=advantage_mask,
            temperature=temperature,
            workspace=workspace,
            backend=backend,
            # Sharded by now or, by accelerate, when training begins; ranks other than the first may
            # hold no weights before.
            check=not self.is_fsdp_enabled and not isinstance(self.model, FSDPModule),
        )

    def _refuse_options(self) -> None:
        wanted = {
            "compute_metrics": self.compute_metrics is not None,
            "preprocess_logits_for_metrics": self.preprocess_logits_for_metrics is not None,
            "compute_loss_func": self.compute_loss_func is not None,
            "args.label_smoothing_factor": self.args.label_smoothing_factor != 0,
            "args.deepspeed": self.is_deepspeed_enabled,
            "args.n_gpu > 1 (nn.DataParallel)": self.args.n_gpu > 1,
        }
        for name, given in wanted.items():
            if given:
                raise ValueError(
                    f"{name}: not supported by the fused loss, which makes no logits and runs in "
                    "the forward of one wrapped model; leave it out, use DDP or FSDP2, or "
                    "transformers.Trainer"
                )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        missing = [name for name in TEACHER_COLUMNS if name not in self._signature_columns]
        self._signature_columns += missing

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in `transformers.Trainer`; the outputs hold the loss alone.

        Raises:
            ValueError: a batch without labels.
        """
        if "labels" not in inputs:
            raise ValueError(f"labels: missing among {', '.join(inputs)}; the collator makes them")
        # The Trainer calls the model and scales what comes back: the loss, for this call.
        inner = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with redirected(inner, self._forward):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.compiler.disable(recursive=False)  # model and loss are compiled, and not what calls them
    def _forward(
        self,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        teacher_input_ids: Tensor | None = None,
        teacher_attention_mask: Tensor | None = None,
        teacher_labels: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        teacher_inputs = None
        if teacher_input_ids is not None:
            teacher_inputs = {
                "input_ids": teacher_input_ids, "attention_mask": teacher_attention_mask,
            }  # fmt: skip
        with self.accelerator.autocast():
            output = self.model_with_loss(
                inputs, labels, teacher_inputs, teacher_labels, normalizer=num_items_in_batch
            )
        return {"loss": output["loss"]}
