"""How exact a gradient has to be, and how exact it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

# What rounding a gradient to bfloat16 loses: half a unit in its last place, 2^-9.
ROUNDING_ERROR = 2e-3


@dataclass(frozen=True)
class GradientTolerance:
    """The error that a gradient may have, in exchange for fewer products.

    The gradient of a token's logits is rounded at random to few entries, so that it is right on
    average: an entry e below a threshold tau becomes tau with probability |e| / tau, else 0. The
    random numbers follow from the bits of the token's hidden states, its target and the seed, so
    that with the same hidden states neither threads nor micro-batches change them.

    Attributes:
        relative_error: the relative standard error that a token's dH may have, in (0, 1).
        seed: another one gives other random numbers.

    Raises:
        TypeError, ValueError: neither a number in (0, 1) nor an integer.
    """

    relative_error: float
    seed: int = 0

    def __post_init__(self) -> None:
        error = self.relative_error
        if isinstance(error, bool) or not isinstance(error, float | int):
            raise TypeError(
                "gradient_tolerance: expected a float, 'rounding', a GradientTolerance or None, "
                f"got {error!r}"
            )
        if not (math.isfinite(error) and 0.0 < error < 1.0):
            raise ValueError(
                "gradient_tolerance: expected a relative error between 0 and 1, both excluded, "
                f"such as 2e-3, or None for an exact gradient; got {error!r}"
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"gradient_tolerance: seed: expected an int, got {self.seed!r}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"gradient_tolerance: seed: expected 64 bits, got {self.seed!r}")

    @classmethod
    def of(cls, value: float | str | GradientTolerance | None) -> GradientTolerance | None:
        """Accept a relative error, "rounding" for that of bfloat16 (2e-3), or None.

        Raises:
            TypeError, ValueError: anything else.
        """
        if value is None or isinstance(value, GradientTolerance):
            return value
        if isinstance(value, str):
            if value != "rounding":
                raise ValueError(f"gradient_tolerance: the only name is 'rounding', got {value!r}")
            return cls(ROUNDING_ERROR)
        return cls(value)


class GradientError(NamedTuple):
    """The relative standard errors of a gradient that a tolerance allowed, as they are predicted
    from the entries that were rounded; 0 where the gradient is exact, NaN until it is made.

    For a scalar loss it is made in the forward pass, for others in the backward pass.

    Attributes:
        hidden: [...] float32, of each token's dH: the square root of the expected
            |dH - exact dH|^2 over |dH|; NaN where the hidden states have no gradient.
        weight: [] float32, of dW in the same way, over all of its elements; NaN for a frozen head.
    """

    hidden: Tensor
    weight: Tensor


class Rounding(NamedTuple):
    """A tolerance on its way to a backend, with the tensors that take the error.

    Attributes:
        tolerance: what is allowed.
        error: `hidden` is [N] here.
    """

    tolerance: GradientTolerance
    error: GradientError

    def begin(self, *, hidden: bool, weight: bool) -> None:
        """Gradients of hidden states and of the head are being made: no error yet, and none of what
        is not made."""
        self.error.hidden.fill_(0.0 if hidden else math.nan)
        self.error.weight.fill_(0.0 if weight else math.nan)
