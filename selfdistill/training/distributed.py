"""Several processes, one run: `torchrun --nproc-per-node N -m selfdistill train CONFIG`.

Every rank takes a share of each step's problems: it samples, judges and scores them, and the
gradients are summed before the step. Each rank divides by the tokens of all ranks, so the sum is
the gradient of one process, and a rank without a problem or without an active token takes part with
zeros. Whole weights on every rank are summed once per step, after all passes; with `shard: true`
(`selfdistill.model.sharding`) FSDP2 sums after each. Rollouts do not depend on the number of ranks,
because every problem has random numbers of its own. Only rank 0 writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

# Gradients travel in pieces of this many elements: few calls, and a small copy (64 MiB).
_PIECE = 1 << 24


@dataclass(frozen=True)
class Ranks:
    """The processes of a run and what they do together; one process alone does the same for free.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True for the one rank that writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of `count` things are this rank's: a run of them, empty when too few."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, *values: float) -> list[float]:
        """Add up each value over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def max(self, value: float) -> float:
        """Return the largest value of all ranks."""
        return max(self.gather([value]))

    def mean(self, values: Sequence[float]) -> float:
        """Return the mean of the values of all ranks."""
        total, count = self.sum(sum(values), len(values))
        return total / count

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on some rank."""
        return self.sum(float(flag))[0] > 0

    def gather(self, items: Sequence[T]) -> list[T]:
        """Return the items of all ranks, in the order of the ranks, on every rank."""
        if self.size == 1:
            return list(items)
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(items))
        return [item for part in parts for item in part]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up the gradients over the ranks, in place.

        Parameters without a gradient on every rank stay without one, as in a single process.
        """
        if self.size == 1:
            return
        parameters = list(parameters)
        counts = self.sum(*(float(parameter.grad is not None) for parameter in parameters))
        waiting: list[torch.Tensor] = []
        for parameter, count in zip(parameters, counts, strict=True):
            if count == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(parameter.grad)
            if sum(gradient.numel() for gradient in waiting) >= _PIECE:
                _sum_together(waiting)
                waiting = []
        if waiting:
            _sum_together(waiting)


# The run of a single process.
ALONE = Ranks()


def _sum_together(tensors: Sequence[torch.Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Meet the other processes that torchrun started, if it did; gloo on CPUs, NCCL on GPUs.

    A process group that exists already is used and left as it is.

    Raises:
        RankFailedError: another rank failed or disappeared, which this one would otherwise only
            see as a connection that was closed.
    """
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    from selfdistill.training.rank_failures import failure_elsewhere

    # The store outlives the group: what a failing rank has to say is left there.
    store, rank, size = next(iter(dist.rendezvous("env://")))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
    )
    ranks = Ranks(rank, size)
    try:
        yield ranks
    except BaseException as error:
        named = failure_elsewhere(
            dist.PrefixStore("failures", store), rank=rank, size=size, error=error
        )
        if named is None:
            raise
        raise named from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
