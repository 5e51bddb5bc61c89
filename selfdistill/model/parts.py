"""Tensors that may be spread over the ranks in parts, by FSDP2, and whole ones, treated alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Tell whether `selfdistill.model.sharding.shard` was called on it."""
    return isinstance(module, FSDPModule)


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, put together from its parts if it has some; then all ranks must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def gather(tensors: Mapping[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Return whole tensors; put together on the CPU, and only where they are kept.

    Args:
        tensors: of which all ranks hold parts, or whole ones, which are returned as they are.
        keep: False returns nothing and only takes part.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


@torch.no_grad()
def assign(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a whole tensor, which every rank has, into one that may be in parts."""
    target.copy_(like(target, source))


def like(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor, which every rank has, in parts where another one of its shape is."""
    if not isinstance(target, DTensor):
        return source
    return distribute_tensor(
        source.to(target.device), target.device_mesh, target.placements, src_data_rank=None
    )
