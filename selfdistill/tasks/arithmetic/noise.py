"""How the shipped solver errs: forgotten carries and slips, at rates that are known.

The corpus writes them into the solver; the task predicts from them how hard a question is for it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from selfdistill.tasks.arithmetic.traces import MODULUS, Operation, Question


@dataclass(frozen=True)
class SolverNoise:
    """How the solver of the corpus errs.

    Attributes:
        forget: for each (sign, digit) the rate at which a carry or borrow is forgotten.
        slip: rate at which any other step's result is off by 1 or 10.
        skip: rate at which a step is done in the head and not written.
    """

    forget: dict[Operation, float]
    slip: float = 0.015
    skip: float = 0.008

    @classmethod
    def draw(cls, *, seed: int, low: float, high: float) -> SolverNoise:
        """Draw each forgetting rate from U(low, high)."""
        rng = random.Random(f"noise/{seed}")
        operations = [Operation(sign, digit) for sign in ("+", "-") for digit in range(1, 10)]
        return cls({operation: rng.uniform(low, high) for operation in operations})

    def result(self, rng: random.Random, left: int, operation: Operation) -> int:
        """Return what the solver writes for one operation."""
        right = operation.apply(left)
        if carries(left, operation) and rng.random() < self.forget[operation]:
            return forget_carry(right, operation)
        return slip(rng, right) if rng.random() < self.slip else right

    def success(self, question: Question) -> float:
        """Return the chance that every step comes out right.

        In a same-sign chain errors do not cancel, so this is nearly that of a right answer.
        """
        return math.prod(
            1 - (self.forget[operation] if carries(left, operation) else self.slip)
            for left, operation in zip(question.states(), question.operations, strict=False)
        )


def carries(left: int, operation: Operation) -> bool:
    """Tell whether the operation changes the tens digit."""
    return operation.apply(left) // 10 != left // 10


def forget_carry(right: int, operation: Operation) -> int:
    """Return the result with the carry or borrow left out."""
    return (right - 10 if operation.sign == "+" else right + 10) % MODULUS


def slip(rng: random.Random, right: int) -> int:
    """Return a result that is off by 1 or 10 in one digit."""
    tens, ones = divmod(right, 10)
    change = rng.choice((-1, 1))
    if rng.random() < 0.5:
        return (tens + change) % 10 * 10 + ones
    return tens * 10 + (ones + change) % 10


SHIPPED_SOLVER = SolverNoise.draw(seed=0, low=0.05, high=0.6)
"""What examples/arithmetic/solver was taught (its training.json has the command)."""
