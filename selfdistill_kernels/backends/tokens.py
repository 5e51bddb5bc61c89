"""Some tokens of a problem, and their rows in tensors [N, ...]."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


class Tokens:
    """n distinct tokens in a fixed order.

    Tokens that follow each other are kept as a range: their rows are views, so that a problem
    without padding gathers and scatters nothing.

    Args:
        count: n.
        first: the first of a range.
        indices: [n] int64, the tokens that are no range.
    """

    __slots__ = ("_first", "_indices", "count")

    def __init__(self, count: int, *, first: int = 0, indices: Tensor | None = None) -> None:
        self.count = count
        self._first = first
        self._indices = indices

    @classmethod
    def where(cls, chosen: Tensor) -> Tokens:
        """The tokens chosen [N] bool, ascending. A GPU is waited for."""
        indices = chosen.nonzero().squeeze(1)
        count = indices.numel()
        return cls(count) if count == chosen.numel() else cls(count, indices=indices)

    @classmethod
    def join(cls, parts: Sequence[Tokens], device: torch.device) -> Tokens:
        """The tokens of one part after the other; at least one part."""
        count = sum(part.count for part in parts)
        follow = all(
            part._indices is None and part._first == before._first + before.count
            for before, part in itertools.pairwise(parts)
        )
        if parts[0]._indices is None and follow:
            return cls(count, first=parts[0]._first)
        return cls(count, indices=torch.cat([part.indices(device) for part in parts]))

    @property
    def is_range(self) -> bool:
        """Whether the tokens follow each other, so that `of` gives views."""
        return self._indices is None

    def indices(self, device: torch.device) -> Tensor:
        """The tokens' places, [n] int64."""
        if self._indices is not None:
            return self._indices
        return torch.arange(self._first, self._first + self.count, device=device)

    def part(self, start: int, stop: int) -> Tokens:
        """The tokens at [start, stop) of the order."""
        if self._indices is None:
            return Tokens(stop - start, first=self._first + start)
        return Tokens(stop - start, indices=self._indices[start:stop])

    def take(self, order: Tensor) -> Tokens:
        """The tokens at the places `order` [m] int64; all of them are taken in their order."""
        count = order.numel()
        if count == self.count:
            return self
        if self._indices is None:
            return Tokens(count, indices=order + self._first)
        return Tokens(count, indices=self._indices.index_select(0, order))

    def of(self, tensor: Tensor) -> Tensor:
        """Rows [n, ...] of a tensor [N, ...]: a view of a range, else a copy."""
        if self._indices is not None:
            return tensor.index_select(0, self._indices)
        if self.count == tensor.shape[0]:
            return tensor
        return tensor.narrow(0, self._first, self.count)

    def put(self, into: Tensor, rows: Tensor) -> None:
        """Write rows [n, ...] to their places in [N, ...]."""
        if self._indices is not None:
            into.index_copy_(0, self._indices, rows)
        else:
            self.of(into).copy_(rows)

    def add(self, into: Tensor, rows: Tensor) -> None:
        """Add rows [n, ...] to those in [N, ...]."""
        if self._indices is not None:
            into.index_add_(0, self._indices, rows)
        else:
            self.of(into).add_(rows)
