"""Which tokens carry a gradient: the advantage mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The numbers are shared with csrc (gate_sign of row_visit_).
SIGNS: dict[str, int] = {"any": 0, "negative": -1, "positive": 1}


@dataclass(frozen=True)
class AdvantageMask:
    """Keeps the tokens whose advantage A = log T(y) - log S(y) says something.

    Attributes:
        threshold: a token is kept when |A| > threshold (nats), for the chosen sign.
        sign: "any", "negative" (A < -threshold) or "positive" (A > threshold).
        top_fraction: of the tokens kept so far, keep those with the largest |A|, at most this
            share of the existing tokens (rounded up); None keeps all.
        per_step: judge whole steps: every token takes the mean advantage of its step
            (`step_ids` of the loss) in place of its own; tokens of no step are dropped.

    A NaN advantage counts as kept, so that it is seen and not hidden.

    Raises:
        ValueError: threshold < 0, unknown sign, or top_fraction outside (0, 1].
    """

    threshold: float = 0.0
    sign: str = "any"
    top_fraction: float | None = None
    per_step: bool = False

    def __post_init__(self) -> None:
        if not self.threshold >= 0.0:
            raise ValueError(f"advantage_mask: threshold must be >= 0, got {self.threshold}")
        if self.sign not in SIGNS:
            raise ValueError(
                f"advantage_mask: unknown sign {self.sign!r}; expected one of {', '.join(SIGNS)}"
            )
        if self.top_fraction is not None and not 0.0 < self.top_fraction <= 1.0:
            raise ValueError(
                f"advantage_mask: top_fraction must lie in (0, 1], got {self.top_fraction}"
            )

    @property
    def is_token_local(self) -> bool:
        """True when each token's fate depends on its own advantage only."""
        return self.top_fraction is None and not self.per_step

    def select(self, advantage: Tensor, exists: Tensor, step_ids: Tensor | None = None) -> Tensor:
        """Return the active tokens.

        Args:
            advantage: [N] float.
            exists: [N] bool, False where there is no token.
            step_ids: [N] int64 in [-1, N), equal for the tokens of one step and -1 outside of
                steps; needed with `per_step`.

        Returns:
            [N] bool, a subset of `exists`.
        """
        existing = exists.sum()
        if self.per_step:
            assert step_ids is not None
            exists = exists & (step_ids >= 0)
            advantage = _step_means(advantage, exists, step_ids)
        keep = exists & token_gate(advantage, SIGNS[self.sign], self.threshold)
        if self.top_fraction is None:
            return keep
        # Rank without reading a value back to the host: stable sort, then the inverse permutation.
        size = advantage.abs().nan_to_num(nan=float("inf")).masked_fill(~keep, -1.0)
        order = size.argsort(descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            0, order, torch.arange(order.numel(), device=order.device)
        )
        allowed = torch.ceil(existing * self.top_fraction)
        return keep & (rank < allowed)


@dataclass(frozen=True)
class Gate:
    """The token-local part of an AdvantageMask, as the kernels take it."""

    sign: int
    threshold: float


def _step_means(advantage: Tensor, exists: Tensor, step_ids: Tensor) -> Tensor:
    """[N] the mean advantage of each token's step, over its existing tokens."""
    index = step_ids.clamp(min=0)
    zero = torch.zeros_like(advantage)
    total = zero.index_add(0, index, torch.where(exists, advantage, zero))
    count = zero.index_add(0, index, exists.to(advantage.dtype))
    return (total / count.clamp(min=1.0))[index]


def token_gate(advantage: Tensor, sign: int, threshold: float) -> Tensor:
    """Threshold and sign test of each token; written so that NaN passes."""
    if sign < 0:
        return ~(advantage >= -threshold)
    if sign > 0:
        return ~(advantage <= threshold)
    return ~(advantage.abs() <= threshold)
