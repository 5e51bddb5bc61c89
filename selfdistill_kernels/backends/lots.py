"""The lots that decide which entries of a rounded gradient stay, and the centre of its head; the
same for every backend that rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.tokens import Tokens

# Rows of the head that its mean is taken from, one in so many: any centre is right, and the mean is
# the best one.
MEAN_STEP = 16
# Elements of hidden states whose bits are multiplied at once.
DIGEST_ELEMENTS = 1 << 16
# Integers of the size of an element.
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multipliers of splitmix64 (S. Vigna, public domain), as signed integers.
GOLDEN, FIRST, SECOND = (
    value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def centre_of(inputs: LinearInputs) -> Tensor:
    """[H] float32, a row c of the head: where the rows of the gradient of the logits sum to 0, an
    entry may be multiplied with W_j - c instead of W_j."""
    assert inputs.weight is not None
    weight = inputs.weight.detach()
    if inputs.transform.softcap is not None:  # it has a slope of its own for every entry
        return weight.new_zeros(weight.shape[1], dtype=torch.float32)
    return weight[::MEAN_STEP].to(torch.float32).mean(dim=0)


def uniform_numbers(keys: Tensor, columns: int) -> Tensor:
    """[r, columns] float64 in (0, 1], `uniform` of csrc/cpu/rounding.inl for keys [r]."""
    mask = (1 << 32) - 1
    low, high = keys[:, None] & mask, (keys[:, None] >> 32) & mask
    x = (torch.arange(columns, device=keys.device) * 0x9E3779B1 + low) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B + high) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    x = x ^ (x >> 16)
    return (x >> 1).to(torch.float64) * 2.0**-31 + 2.0**-32


def keys_of(inputs: LinearInputs, tokens: Tokens, seed: int) -> Tensor:
    """[r] int64, what the random numbers of each token follow from: the bits of its hidden states
    and its target."""
    keys = torch.full((tokens.count,), seed, dtype=torch.int64) * GOLDEN
    for hidden in (inputs.student_hidden, inputs.teacher_hidden):
        if hidden is not None:
            keys = _mixed(keys + _digest(tokens.of(hidden)))
    if inputs.targets is not None:
        keys = _mixed(keys + tokens.of(inputs.targets) * GOLDEN)
    return keys


def copies_of(keys: Tensor) -> Tensor:
    """[n] float32, how many of the tokens with keys [n] draw the lots that each one draws: their
    errors add up, where those of others average out."""
    _, places, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    return counts[places].to(torch.float32)


def _digest(rows: Tensor) -> Tensor:
    """[r] int64 of the bits of rows [r, H]."""
    factors = _mixed(torch.arange(1, rows.shape[1] + 1, dtype=torch.int64) * GOLDEN)
    # By parts: a product has eight bytes for each element.
    parts = rows.split(max(DIGEST_ELEMENTS // max(rows.shape[1], 1), 1))
    words = (part.contiguous().view(WORDS[rows.element_size()]) for part in parts)
    return torch.cat([(part * factors).sum(dim=1) for part in words])


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of splitmix64, on int64 that wrap around."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))
