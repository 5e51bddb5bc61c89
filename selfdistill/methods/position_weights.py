"""How much a token counts by its place in its rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from selfdistill.config import PositionWeightConfig


def position_weights(settings: PositionWeightConfig, positions: Tensor) -> Tensor:
    """Return the weight of each token.

    From what is reported of arXiv 2605.21606: the place of a token predicts how far its
    self-teacher can be relied on, better than entropy does. The shapes of the curve are ours; a
    table takes one that was learned.

    Args:
        settings: the curve.
        positions: [T] int64, the token's place within its completion, from 0.

    Returns:
        [T] float32, 0 or more.
    """
    match settings.name:
        case "linear":
            way = (positions / settings.over).clamp(max=1.0)
            return settings.first + (settings.last - settings.first) * way
        case "exponential":
            halves = torch.exp2(-positions / settings.half_life)
            return settings.floor + (1.0 - settings.floor) * halves
        case "table":
            table = torch.tensor(settings.weights, device=positions.device)
            return table[(positions // settings.every).clamp(max=len(table) - 1)]
