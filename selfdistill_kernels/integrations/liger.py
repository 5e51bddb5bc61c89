"""Modules with the names, signatures and numbers of Liger's (0.8.5); Liger itself is not needed.

Liger's LigerFusedLinearKLDivLoss has no counterpart: it is given the teacher's probabilities
[tokens, vocabulary], and from then on `distillation_from_logits` with their logarithm is the loss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from selfdistill_kernels.logprobs import fused_linear_logprobs
from selfdistill_kernels.loss import fused_linear_distillation
from selfdistill_kernels.objective import Objective

Losses = tuple[Tensor, Tensor, Tensor]


class LigerFusedLinearJSDLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearJSDLoss`.

    The loss is weight_hard_loss * cross entropy (at temperature 1) + weight_soft_loss * generalised
    JSD (at `temperature`), each a mean over the labels that are not ignore_index.

    Args:
        weight_hard_loss, weight_soft_loss, ignore_index, temperature: see above.
        beta: 0 is forward KL, 1 reverse KL.
        compiled, chunk_size: taken for the sake of the signature; the kernels have plans of their
            own, and no chunk to choose.
        return_soft_hard_loss: return (loss, soft loss, hard loss), of which the first carries
            gradients.

    Raises:
        ValueError: beta, temperature or a negative weight.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        if weight_hard_loss < 0 or weight_soft_loss < 0:
            raise ValueError(
                "weight_hard_loss, weight_soft_loss: expected numbers >= 0, got "
                f"{weight_hard_loss} and {weight_soft_loss}"
            )
        self.objective = Objective("jsd", beta=beta)
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | Losses:
        """Return the loss, or (loss, soft loss, hard loss).

        Args:
            student_input: [tokens, H]; student_weight: [V, H]; student_bias: [V] or None.
            teacher_input: [tokens, H_t]; teacher_weight: [V, H_t]; teacher_bias: [V] or None.
            true_labels: [tokens] int.

        Raises:
            ValueError, TypeError: as `fused_linear_distillation`. A teacher with a larger
                vocabulary, for which Liger pads the student's logits, is refused, too.
        """
        hard, soft = self.weight_hard_loss, self.weight_soft_loss
        # One visit makes both terms where they share a temperature and the soft one is not nothing.
        together = self.temperature == 1.0 and soft > 0
        output = fused_linear_distillation(
            student_input,
            teacher_input,
            student_weight,
            true_labels,
            teacher_weight=teacher_weight,
            bias=student_bias,
            teacher_bias=teacher_bias,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            objective=replace(self.objective, cross_entropy=hard / soft if together else 0.0),
        )
        tokens = (true_labels != self.ignore_index).sum().clamp(min=1)
        soft_loss = output.divergence.sum() / tokens
        loss = soft * output.loss
        if together:
            assert output.student_logprob is not None
            hard_loss = -output.student_logprob.sum() / tokens
        elif hard > 0 or self.return_soft_hard_loss:
            hard_loss = -fused_linear_logprobs(
                student_input, student_weight, true_labels, bias=student_bias,
                ignore_index=self.ignore_index,
            ).logprobs.sum() / tokens  # fmt: skip
            loss = loss + hard * hard_loss
        else:
            hard_loss = torch.zeros_like(soft_loss)
        if not self.return_soft_hard_loss:
            return loss
        return loss, soft_loss, hard_loss.detach()


class LigerFusedLinearJSD(nn.Module):
    """`liger_kernel.transformers.LigerFusedLinearJSD`: the divergence alone.

    Args:
        jsd_beta: 0 is forward KL, 1 reverse KL. ignore_index, temperature: as above.
        accum_dtype: None or torch.float32, which the kernels add up in anyway.

    Raises:
        ValueError: another accum_dtype, beta or temperature.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if accum_dtype not in (None, torch.float32):
            raise ValueError(
                f"accum_dtype: expected None or torch.float32, in which the gradient of the weight "
                f"is added up here, got {accum_dtype}"
            )
        self.objective = Objective("jsd", beta=jsd_beta)
        self.ignore_index = ignore_index
        self.temperature = temperature

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Return the mean over the tokens whose label is not ignore_index; shapes as above."""
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        return fused_linear_distillation(
            student_input,
            teacher_input,
            student_weight,
            teacher_weight=teacher_weight,
            mask=mask,
            temperature=self.temperature,
            objective=self.objective,
        ).loss
