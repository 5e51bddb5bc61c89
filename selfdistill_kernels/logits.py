"""How raw scores become logits: bias, then scale, then soft cap, then temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitTransform:
    """z = cap(scale * (h W^T + b)) / temperature with cap(u) = softcap * tanh(u / softcap).

    Raises:
        ValueError: temperature <= 0 or softcap <= 0.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap must be > 0 or None, got {self.softcap}")

    def apply(self, raw: Tensor, bias: Tensor | None) -> Tensor:
        """Turn raw scores [..., V] and a bias [V] into logits [..., V]."""
        scores = raw if bias is None else raw + bias
        scores = scores * self.logit_scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores / self.temperature

    def chain(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn a gradient with respect to the logits into one with respect to raw + bias."""
        gradient = gradient * (self.logit_scale / self.temperature)
        if self.softcap is None:
            return gradient
        capped = logits * (self.temperature / self.softcap)
        return gradient * (1.0 - capped * capped)
