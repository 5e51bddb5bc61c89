"""How a model turns hidden states into logits; what the fused losses need to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.model.attention import base_causal_lm
from selfdistill.model.teacher import Teacher


@dataclass(frozen=True)
class LMHead:
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


class UnsupportedHeadError(UserError):
    """The model makes its logits in a way that the fused loss does not know."""


def find_lm_head(model: torch.nn.Module) -> LMHead:
    """Find a model's head and make sure that it is all there is between hidden states and logits.

    Raises:
        UnsupportedHeadError: the model's own logits differ from what the head gives.
    """
    base = base_causal_lm(model)
    layer = base.get_output_embeddings()
    config = base.get_decoder().config
    head = LMHead(
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


def find_lm_heads(student: torch.nn.Module, teacher: Teacher | None) -> tuple[LMHead, LMHead]:
    """Return the heads of the student and of its teacher; without a teacher twice the student's.

    The weights of both change in place as training goes on.
    """
    own = find_lm_head(student)
    if teacher is None:
        return own, own
    with teacher.weights(student) as teacher_model:
        return own, find_lm_head(teacher_model)


def _logit_scale(config: object) -> float:
    """Cohere multiplies the logits by `logit_scale`, Granite divides them by `logits_scaling`."""
    return float(getattr(config, "logit_scale", 1.0)) / float(
        getattr(config, "logits_scaling", 1.0)
    )
