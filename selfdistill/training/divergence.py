"""A run whose numbers are no numbers any more stops before it ruins its weights."""

from __future__ import annotations

import math

from selfdistill.errors import UserError
from selfdistill.training.checkpoint import CheckpointStore


class DivergedError(UserError):
    """The loss or the gradient is no longer a finite number."""


def refuse_divergence(step: int, loss: float, grad_norm: float, store: CheckpointStore) -> None:
    """Stop before a step that would ruin the weights.

    Raises:
        DivergedError: the loss or the gradient norm is not finite.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise DivergedError(
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}, expected finite "
        f"numbers. The step was not taken; the last good state is {store.last}. Lower "
        "optimizer.learning_rate, or look at the rollouts of this step."
    )
