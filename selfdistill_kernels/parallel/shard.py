"""One process's part of the vocabulary, and how the parts become results of the whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabularyShard:
    """The entries [start, start + size) of a vocabulary that lies in parts on the ranks of a group.

    The methods are collectives: every rank calls them in the same order, with the same shapes, and
    has the same result.

    Attributes:
        group: the ranks, in the order of their parts.
        start: first entry of this rank.
        size: entries of this rank.
        vocabulary: V, the entries of all ranks.
    """

    group: dist.ProcessGroup
    start: int
    size: int
    vocabulary: int

    def largest(self, values: Tensor) -> Tensor:
        """The element-wise maximum over the ranks; `values` are kept."""
        found = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks; `values` are kept."""
        found = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, dist.ReduceOp.SUM, group=self.group)
        return found

    def gathered(self, values: Tensor) -> Tensor:
        """[ranks, ...] the values [...] of every rank."""
        return gathered(values, self.group)


def gathered(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...] the values [...] of every rank of a group."""
    values = values.contiguous()
    found = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, values, group=group)
    return torch.stack(found)
