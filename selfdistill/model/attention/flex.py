"""FlexAttention with one mask for both roles: a block-sparse kernel compiled for the GPU.

A query sees a key when both belong to the same group, the key lies in the group's prefix or in the
query's own branch, and the key's position is not after the query's. Nothing is gathered: the keys
are the borrowed ones followed by the row's, each once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from selfdistill.model.layout import PackedRow

F = TypeVar("F", bound=Callable[..., Any])
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# The branch of what all branches of a group see: trunk and borrowed keys.
_PREFIX = -1


class FlexAttention:
    """Attention over one row through `flex_attention`, compiled on a GPU and eager on a CPU.

    Args:
        row: the packed row.
        device: where the model computes.
    """

    def __init__(self, row: PackedRow, device: torch.device) -> None:
        num_borrowed, length = len(row.borrowed_index), row.input_ids.shape[1]
        # Of every key: its group, its branch and its position in its own sequence.
        places = torch.empty(3, num_borrowed + length, dtype=torch.int32)
        for segment in row.segments:
            key_index = segment.key_index(num_borrowed)
            own = key_index[-len(segment.own) :]
            places[0, key_index] = segment.group
            places[1, key_index[: -len(segment.own)]] = _PREFIX
            places[1, own] = _PREFIX if segment.branch is None else segment.branch
            places[2, key_index] = torch.arange(segment.num_keys, dtype=torch.int32)
        places = places.to(device)
        self._keys = places.unbind()
        self._queries = places[:, num_borrowed:].contiguous().unbind()
        self._device = device
        self._block_masks: dict[int | None, BlockMask] = {}

    def mask_mod(self, sliding_window: int | None) -> MaskMod:
        """Return the mask as a function of batch, head, query and key index (row, all keys)."""
        # Locals: the compiled kernel takes them as inputs, so a new row compiles nothing anew.
        query_group, query_branch, query_position = self._queries
        key_group, key_branch, key_position = self._keys

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            group = query_group[query] == key_group[key]
            path = (key_branch[key] == _PREFIX) | (key_branch[key] == query_branch[query])
            distance = query_position[query] - key_position[key]
            visible = group & path & (distance >= 0)
            return visible if sliding_window is None else visible & (distance < sliding_window)

        return sees

    def block_mask(self, sliding_window: int | None) -> BlockMask:
        """Return the blocks that the kernel visits; made once for all layers with this window."""
        if sliding_window not in self._block_masks:
            self._block_masks[sliding_window] = _for_device(create_block_mask, self._device)(
                self.mask_mod(sliding_window),
                None,
                None,
                len(self._queries[0]),
                len(self._keys[0]),
                device=str(self._device),
            )
        return self._block_masks[sliding_window]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """See `backend.Backend`."""
        out = _for_device(flex_attention, self._device)(
            query,
            key,
            value,
            block_mask=self.block_mask(sliding_window),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)


def _for_device(function: F, device: torch.device) -> F:
    return cast(F, _compiled(function)) if device.type == "cuda" else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile once for the process; lengths become symbols when they first change."""
    return torch.compile(function)
