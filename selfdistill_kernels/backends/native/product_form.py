"""Which form of the float32 logits product is the faster one on this machine, found by asking it.

hidden weight^T may be made as it is written, by torch.mm, or as weight hidden^T whose blocks are
turned round (csrc/cpu/transposed.cpp). Where the library is slow with a wide head the other form
takes a half to three quarters of the time; elsewhere it loses. The two are compared once in a
process for each class of shapes, on the operands of the first call and in the memory of its result,
and the other form is taken only where it makes the same bits: what the clock says, which is never
twice the same, then decides about time alone (docs/decisions/kernels-cpu.md).
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["plain", "transposed"]

# Below these many tokens the library has routines of its own, which sum in other orders.
FEW_TOKENS = 16
# More tokens than these only repeat what a block of them does.
MANY_TOKENS = 256
# Below these many columns torch.mm was at the peak of every processor that was tried.
FEW_COLUMNS = 8192
# Half of the first call's columns are compared, and no more than these.
MANY_COLUMNS = 8192
ROUNDS = 3
# A gain that a busy machine does not make up, by the median of interleaved rounds.
WORTH = 0.9


@dataclass(frozen=True)
class Comparison:
    """What a comparison of the two forms found.

    Attributes:
        ratio: median time of the transposed form over the plain one's.
        same_bits: whether their results were equal in every bit.
    """

    ratio: float
    same_bits: bool

    @property
    def form(self) -> Form:
        """The form to take."""
        return "transposed" if self.same_bits and self.ratio < WORTH else "plain"

    def describe(self) -> str:
        """Such as "transposed (transposed in 0.61 of the plain time, the same bits)"."""
        bits = "the same" if self.same_bits else "other"
        return f"{self.form} (transposed in {self.ratio:.2f} of the plain time, {bits} bits)"


# By tokens (a power of two), hidden size and threads.
_compared: dict[tuple[int, int, int], Comparison] = {}


def logits_product(hidden: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out [r, c] = hidden [r, H] weight [c, H]^T in the faster form, all float32, on any device."""
    if form_for(hidden, weight, out) == "transposed":
        torch.ops.selfdistill.gemm_transposed_logits_(hidden, weight, out)
    else:
        torch.mm(hidden, weight.T, out=out)


def form_for(hidden: Tensor, weight: Tensor, out: Tensor) -> Form:
    """The form for this product; where its class is new, `out` is written to find it."""
    tokens, size = hidden.shape
    if hidden.device.type != "cpu" or tokens < FEW_TOKENS or weight.shape[0] < FEW_COLUMNS:
        return "plain"
    # Half of the tokens decide as well as all of them.
    tokens = min(1 << (tokens.bit_length() - 1), MANY_TOKENS)
    key = (tokens, size, torch.get_num_threads())
    if key not in _compared:
        _compared[key] = compare(hidden[:tokens], weight, out[:tokens])
    return _compared[key].form


def compare(hidden: Tensor, weight: Tensor, out: Tensor) -> Comparison:
    """Make the same logits in both forms, each in a half of `out` [r, c], c at least 2."""
    columns = min(weight.shape[0] // 2, MANY_COLUMNS)
    plain, transposed = out[:, :columns], out[:, columns : 2 * columns]
    head = weight[:columns]
    ratios = []
    for _ in range(ROUNDS + 1):  # the first of them finds memory cold
        start = time.perf_counter()
        torch.mm(hidden, head.T, out=plain)
        between = time.perf_counter()
        torch.ops.selfdistill.gemm_transposed_logits_(hidden, head, transposed)
        ratios.append((time.perf_counter() - between) / max(between - start, 1e-9))
    # Bits, for a NaN equals no NaN.
    same = torch.equal(plain.view(torch.int32), transposed.view(torch.int32))
    return Comparison(statistics.median(ratios[1:]), same)
