"""How exact a gradient has to be, and how exact it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
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
        bound_risk: a probability in (0, 1) asks for bounds on the errors: over the random numbers,
            that with which any of one call's may be exceeded. They take exponentials of all
            entries. None for the standard errors only.

    Raises:
        TypeError, ValueError: neither numbers in (0, 1) nor an integer.
    """

    relative_error: float
    seed: int = 0
    bound_risk: float | None = None

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
        risk = self.bound_risk
        if risk is None:
            return
        if isinstance(risk, bool) or not isinstance(risk, float):
            raise TypeError(
                f"gradient_tolerance: bound_risk: expected a float or None, got {risk!r}"
            )
        if not 0.0 < risk < 1.0:
            raise ValueError(
                "gradient_tolerance: bound_risk: expected a probability between 0 and 1, both "
                f"excluded, such as 1e-6, or None for no bounds; got {risk!r}"
            )

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
        hidden_bound, weight_bound: with the tolerance's `bound_risk`, what |dH - exact dH| over
            |exact dH| of a token, and the same of dW, cannot be above but with that probability;
            inf where the exact gradient may be 0. None without.
    """

    hidden: Tensor
    weight: Tensor
    hidden_bound: Tensor | None = None
    weight_bound: Tensor | None = None


class Rounding(NamedTuple):
    """A tolerance on its way to a backend, with the memory that takes the errors of N tokens.

    Attributes:
        tolerance: what is allowed.
        table: [1, N + 1] float32, the standard errors of each dH and of dW, or with bounds
            [2, N + 1], whose second row they are.
    """

    tolerance: GradientTolerance
    table: Tensor

    @classmethod
    def of(cls, tolerance: GradientTolerance, hidden: Tensor) -> Rounding:
        """For hidden states [N, H]; errors are NaN."""
        rows = 1 if tolerance.bound_risk is None else 2
        size = (rows, hidden.shape[0] + 1)
        return cls(tolerance, hidden.new_full(size, math.nan, dtype=torch.float32))

    @property
    def error(self) -> GradientError:
        """Views of the table, `hidden` of N tokens."""
        return GradientError(*(part for row in self.table for part in (row[:-1], row[-1])))

    @property
    def log_risk(self) -> float:
        """The logarithm of 2 / the risk of one bound: those of N tokens and of dW share theirs."""
        assert self.tolerance.bound_risk is not None
        return math.log(2 * self.table.shape[1] / self.tolerance.bound_risk)

    def begin(self, *, hidden: bool, weight: bool) -> None:
        """Gradients of hidden states and of the head are being made: no error yet, and none of what
        is not made."""
        self.table[:, :-1].fill_(0.0 if hidden else math.nan)
        self.table[:, -1].fill_(0.0 if weight else math.nan)


def relative_bound(variance: Tensor, step: Tensor, made: Tensor, log_risk: float) -> Tensor:
    """What the error of a sum of independent random vectors cannot be above, over its exact size.

    Bernstein's inequality in a Hilbert space (I. Pinelis, Annals of Probability 22, 1994, theorem
    3.4): |S| <= t but with probability 2 exp(-t^2 / (2 variance + 2/3 step t)).

    Args:
        variance: [...] the sum of the vectors' variances.
        step: [...] the largest length of one.
        made: [...] the length of what the error is a part of.
        log_risk: the logarithm of 2 over the probability.

    Returns:
        [...], inf where the exact size may be 0.
    """
    part = step * (log_risk / 3)
    far = part + (part.square() + 2 * log_risk * variance).sqrt()
    bound = torch.where(far < made, far / (made - far), math.inf)
    return bound.masked_fill(far == 0, 0.0)


def errors_of(rounding: Rounding | None, leading: tuple[int, ...]) -> GradientError | None:
    """The errors, of tokens [...]: views of what the backend fills."""
    if rounding is None:
        return None
    error = rounding.error
    bound = error.hidden_bound
    return error._replace(
        hidden=error.hidden.view(leading),
        hidden_bound=None if bound is None else bound.view(leading),
    )
