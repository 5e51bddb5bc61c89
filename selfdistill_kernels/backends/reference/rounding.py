"""Gradients of logits rounded at random to few entries (docs/tolerance.md), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.lots import centre_of, copies_of, keys_of, uniform_numbers
from selfdistill_kernels.backends.tokens import Tokens
from selfdistill_kernels.tolerance import Rounding, relative_bound

# Of the allowed variance, what thresholds are chosen for, as in csrc/cpu/rounding.inl.
SHARE = 0.75
STEPS = 60


class RoundedRows:
    """Gradients [n, V] of some rows, rounded.

    Args:
        inputs: the problem.
        rows: [n] int64, ascending.
        gradient: [n, V], exact.
        rounding: what is allowed.
    """

    def __init__(
        self, inputs: LinearInputs, rows: Tensor, gradient: Tensor, rounding: Rounding
    ) -> None:
        assert inputs.weight is not None
        self._inputs, self._rows, self._rounding = inputs, rows, rounding
        self._centre = centre_of(inputs).to(gradient.dtype)
        self._head = inputs.weight.to(gradient.dtype) - self._centre
        tolerance = rounding.tolerance
        spread = self._head.square().sum(dim=1)
        size = gradient.abs()
        # The largest threshold whose variance is allowed, by halves of its logarithm.
        allowed = SHARE * tolerance.relative_error**2 * (gradient @ self._head).square().sum(dim=1)
        high = size.sum(dim=1).clamp(min=1e-300).log2()
        low = high - 200.0
        for _ in range(STEPS):
            tau = torch.exp2((low + high) / 2)
            fits = _variances(size, tau) @ spread <= allowed
            low, high = torch.where(fits, tau.log2(), low), torch.where(fits, high, tau.log2())
        tau = torch.exp2(low)[:, None]
        keys = keys_of(inputs, Tokens(rows.numel(), indices=rows), tolerance.seed)
        stays = size > uniform_numbers(keys, size.shape[1]).to(size.device) * tau
        if inputs.targets is not None:  # stays what it is
            stays.scatter_(1, inputs.targets[rows, None], False)
        small = (size < tau) & (size > 0)
        if inputs.targets is not None:
            small.scatter_(1, inputs.targets[rows, None], False)
        rounded = torch.where(small, gradient.sign() * tau * stays, gradient)
        # A row that is not finite stays exact.
        finite = gradient.isfinite().all(dim=1)
        self.gradient = torch.where(finite[:, None], rounded, gradient)
        is_rounded = small & finite[:, None]
        own = torch.where(is_rounded, size * (tau - size), 0.0)
        copies = copies_of(keys).to(own)
        self._variance = own @ spread
        self._own_variance = own.sum(dim=1) * copies
        # The most that the lot of one entry moves dH, and those of a token and its copies an entry.
        self._step = tau[:, 0] * torch.where(is_rounded, spread, 0.0).amax(dim=1).sqrt()
        self._own_step = torch.where(is_rounded.any(dim=1), tau[:, 0] * copies, 0.0)

    def hidden(self) -> Tensor:
        """dH [n, H] before it is rounded to a dtype; notes its error."""
        made = self.gradient @ self._head
        # With the whole sum of a row that is exact, or that does not sum to 0.
        exact = self._variance == 0
        made = torch.where(exact[:, None], self.gradient @ (self._head + self._centre), made)
        error = (self._variance / made.square().sum(dim=1)).sqrt()
        error = torch.where(exact, 0.0, error)
        said = self._rounding.error
        said.hidden[self._rows] = error.to(torch.float32)
        if said.hidden_bound is not None:
            sizes, log_risk = made.norm(dim=1), self._rounding.log_risk
            bound = relative_bound(self._variance, self._step, sizes, log_risk)
            said.hidden_bound[self._rows] = bound.to(torch.float32)
        return made

    def note_weight(self, weight: Tensor) -> None:
        """Note the error of dW [V, H]."""
        lengths = self._inputs.student_hidden[self._rows].to(weight.dtype).square().sum(dim=1)
        variance = self._own_variance @ lengths
        error = (variance / weight.square().sum()).sqrt() if variance > 0 else variance
        said = self._rounding.error
        said.weight.copy_(error)
        if said.weight_bound is not None and variance > 0:
            step = (self._own_step * lengths.sqrt()).max()
            bound = relative_bound(variance, step, weight.norm(), self._rounding.log_risk)
            said.weight_bound.copy_(bound)


def _variances(size: Tensor, tau: Tensor) -> Tensor:
    """[n, V], |e| (tau - |e|) of entries below tau [n]."""
    return size * (tau[:, None] - size).clamp(min=0.0)
