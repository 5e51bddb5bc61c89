"""From DTensors, or plain shards with a process group, to this rank's tensors and its shard."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfdistill_kernels.parallel.shard import VocabularyShard, gathered
from selfdistill_kernels.transforms import NO_SHARDS, is_transformed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Sums of hidden states that ranks compare: that all of them agree by chance is out of the question.
CHECKSUMS = 8
# How far a checksum may be off, relative to its standard deviation over random data. Ranks that
# computed the same hidden states apart differ by roundings.
CHECKSUM_TOLERANCE = 0.03


def local_operands(
    hidden: Mapping[str, Tensor | None],
    heads: Mapping[str, Tensor | None],
    group: dist.ProcessGroup | None,
) -> tuple[dict[str, Tensor | None], dist.ProcessGroup | None]:
    """This rank's tensors, and the group whose ranks share the vocabulary; None: it is whole.

    Args:
        hidden: hidden states by argument name; DTensors are replicated.
        heads: weights and biases by argument name, "weight" first: plain tensors, or DTensors that
            are all sharded along the vocabulary in one way.
        group: the ranks of plain shards.

    Raises:
        TypeError, ValueError: heads that are not sharded alike, or not along the vocabulary; the
            message names the argument.
        NotImplementedError: a DTensor inside of a transform of torch.func.
    """
    operands = {**hidden, **heads}
    if is_transformed() and any(map(_holds_dtensor, operands.values())):
        raise NotImplementedError(NO_SHARDS)
    for name, head in heads.items():
        _refuse_unreduced(name, head)
    sharded = {name: head for name, head in heads.items() if is_dtensor(head)}
    if not sharded:
        for name, states in hidden.items():
            if is_dtensor(states):
                raise TypeError(
                    f"{name}: a DTensor, but weight is none; pass a weight that is sharded over "
                    f"the same mesh, or {name} as a plain tensor"
                )
        return operands, group
    if group is not None:
        raise ValueError(
            "group: given, but weight is a DTensor, which knows its ranks; leave group out, or "
            "pass weight.to_local()"
        )
    for name, head in heads.items():
        if head is not None and name not in sharded:
            raise TypeError(
                f"{name}: a plain tensor, but {next(iter(sharded))} is a DTensor; student and "
                "teacher heads and their biases must be sharded alike"
            )
    first, layout = next(iter(sharded.items()))
    for name, head in sharded.items():
        _check_layout(name, head, first, layout)
        operands[name] = head.to_local()
    mesh = layout.device_mesh
    for name, states in hidden.items():
        if is_dtensor(states):
            operands[name] = _replicated(name, states, layout)
    return operands, mesh.get_group()


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor; that module is imported for subclasses of Tensor only."""
    if type(value) in (Tensor, nn.Parameter) or not isinstance(value, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _holds_dtensor(value: Tensor | None) -> bool:
    """Whether a tensor is a DTensor below the wrappers of torch.func's transforms."""
    while isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return is_dtensor(value)


def agreed_shard(
    group: dist.ProcessGroup,
    *,
    size: int,
    hidden: Mapping[str, Tensor],
    exists: Tensor,
    targets: Tensor | None,
    settings: str,
) -> VocabularyShard:
    """The shard of this rank, once all ranks have shown that they compute the same loss.

    One small exchange of some numbers a rank; a GPU is waited for.

    Args:
        group: the ranks.
        size: vocabulary entries of this rank.
        hidden: hidden states [N, H] by argument name.
        exists: [N] bool.
        targets: [N] int64 or None.
        settings: what else decides which numbers the ranks exchange.

    Raises:
        ValueError: on all ranks, where tokens, hidden states or settings differ between them.
    """
    tokens = exists.numel()
    existing = exists.sum()
    targets_sum = 0 if targets is None else torch.where(exists, targets, 0).sum()
    mine = [size, tokens, existing, targets_sum, zlib.crc32(settings.encode())]
    for states in hidden.values():
        mine += _checksums(states, exists)
    device = exists.device
    row = torch.stack(
        [torch.as_tensor(value, dtype=torch.float64, device=device) for value in mine]
    )
    table = gathered(row, group).tolist()

    _check_same(list(hidden), table)
    rank = dist.get_rank(group)
    sizes = [int(numbers[0]) for numbers in table]
    return VocabularyShard(group, sum(sizes[:rank]), size, sum(sizes))


def _refuse_unreduced(name: str, head: Tensor | None) -> None:
    """Raise ValueError for a whole head made of a DTensor in such a way that autograd takes each
    rank's gradient for that of all ranks."""
    if torch.compiler.is_compiling() or not isinstance(head, Tensor) or not head.requires_grad:
        return
    made_by: Any = head.grad_fn
    if type(made_by).__name__ != "_ToTorchTensorBackward" or made_by.grad_placements is not None:
        return
    spec = made_by.dtensor_spec
    if spec.mesh.size() > 1 and all(placement.is_replicate() for placement in spec.placements):
        raise ValueError(
            f"{name}: made by full_tensor(), whose gradient stays on its rank, so that ranks with "
            "tokens of their own train apart. With FSDP2 compute the loss in the forward of the "
            "module that fully_shard was called on last (ModelWithLoss does), or gather by "
            'full_tensor(grad_placements=[Partial("avg")]), which averages as FSDP2 does; with '
            "tensor parallelism pass the DTensor itself"
        )


def _check_layout(name: str, head: DTensor, first: str, layout: DTensor) -> None:
    """Raise ValueError unless a head is sharded along the vocabulary, as the first is."""
    from torch.distributed.tensor import Shard

    mesh, placements = head.device_mesh, head.placements
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise ValueError(
            f"{name}: a DTensor with placements {placements} over a mesh of shape "
            f"{tuple(mesh.shape)}; expected (Shard(dim=0),) over a mesh of one dimension, as "
            "ColwiseParallel makes of an lm_head; redistribute it, or pass a plain tensor"
        )
    if mesh != layout.device_mesh or head.shape[0] != layout.shape[0]:
        raise ValueError(
            f"{name}: {head.shape[0]} rows over {mesh}, but {first} has {layout.shape[0]} over "
            f"{layout.device_mesh}; student and teacher heads and their biases must be sharded "
            "alike"
        )
    order = mesh.mesh.flatten().tolist()
    if order != sorted(order):
        # A group counts its ranks upwards, whatever the order of the mesh and so of the shards.
        raise ValueError(
            f"{name}: its shards lie on the ranks {order} in this order; expected ascending ranks, "
            "as init_device_mesh arranges them"
        )
    rows, ranks = head.shape[0], mesh.size()
    if math.ceil(rows / math.ceil(rows / ranks)) < ranks:
        raise ValueError(
            f"{name}: {rows} rows over {ranks} ranks leave a rank without any; use fewer ranks"
        )


def _replicated(name: str, states: DTensor, layout: DTensor) -> Tensor:
    """Hidden states of the whole batch, as every rank of the head's mesh has them."""
    from torch.distributed.tensor import Replicate

    if states.device_mesh != layout.device_mesh:
        raise ValueError(
            f"{name}: a DTensor over {states.device_mesh}, but the head lies over "
            f"{layout.device_mesh}; redistribute one of them"
        )
    replicate = [Replicate()]
    return states.redistribute(placements=replicate).to_local(grad_placements=replicate)


def _checksums(states: Tensor, exists: Tensor) -> list[Tensor]:
    """Sums over parts of the hidden states [N, H] of tokens that exist, then their mean square."""
    kept = torch.where(exists[:, None], states.detach(), 0.0)
    columns = kept.sum(dim=0, dtype=torch.float64)
    sums = [columns[part::CHECKSUMS].sum() for part in range(CHECKSUMS)]
    return [*sums, torch.linalg.vector_norm(kept, dtype=torch.float64) / math.sqrt(CHECKSUMS)]


def _check_same(names: list[str], table: list[list[float]]) -> None:
    """Raise ValueError, the same on every rank, unless all rows of the table tell of one loss."""
    why = (
        "the ranks that share a vocabulary compute one loss of the same tokens. Where each rank "
        "has tokens of its own, as under FSDP2, compute the loss in the forward of the module "
        "that fully_shard was called on last (ModelWithLoss does), where the head is whole"
    )
    _, tokens, existing, targets, settings, *checksums = zip(*table, strict=True)
    if len(set(settings)) > 1:
        raise ValueError(
            "objective: the ranks have different backends, objectives, advantage masks, logit "
            f"scales, caps or temperatures, or not all want a gradient of {names[0]}; {why}"
        )
    for name, counts, what in (
        (names[0], tokens, "tokens"),
        ("mask", existing, "tokens that exist"),
        ("targets", targets, "as their sum"),
    ):
        if len(set(counts)) > 1:
            numbers = ", ".join(f"{count:.0f}" for count in counts)
            raise ValueError(f"{name}: the ranks have {numbers} {what}; {why}")
    for name in names:
        *sums, sizes = checksums[: CHECKSUMS + 1]
        del checksums[: CHECKSUMS + 1]
        # A NaN passes: it is for the loss to show.
        if any(max(each) - min(each) > CHECKSUM_TOLERANCE * max(sizes) for each in sums):
            raise ValueError(f"{name}: the ranks have different hidden states; {why}")
