"""FlashAttention's variable-length kernel: all segments of a row in one call (CUDA, 16 bits).

Queries need no gathering: the segments follow each other in the row. Keys and values are gathered
segment by segment, [sum of num_keys, kv_heads, head_dim], so that each segment is a sequence of its
own whose queries are its last positions; flash-attn 2.1 and later align the causal mask and the
window to the lower right corner, which is just that. The prefix's gradients are summed over the
branches, in float32, by the backward pass of the gather.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from selfdistill.model.float32_sum import select_rows
from selfdistill.model.layout import PackedRow


class FlashAttention:
    """Attention over one row through `flash_attn.flash_attn_varlen_func`.

    Args:
        row: the packed row.
        device: where the model computes.

    Raises:
        ImportError: flash-attn is not installed.
    """

    def __init__(self, row: PackedRow, device: torch.device) -> None:
        # Imported here: the package is optional and needs a GPU.
        from flash_attn import flash_attn_varlen_func

        self._varlen = flash_attn_varlen_func
        queries = [len(segment.own) for segment in row.segments]
        keys = [segment.num_keys for segment in row.segments]
        num_borrowed = len(row.borrowed_index)
        self._key_index = torch.cat([s.key_index(num_borrowed) for s in row.segments]).to(device)
        self._queries_until = _starts(queries).to(device)
        self._keys_until = _starts(keys).to(device)
        self._max_queries, self._max_keys = max(queries), max(keys)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """See `backend.Backend`."""
        width = value.shape[-1]
        # The kernel has one head_dim: a narrower value (latent attention) is filled up, then cut.
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
        out = self._varlen(
            query[0].transpose(0, 1).contiguous(),
            self._gather(key),
            self._gather(value),
            cu_seqlens_q=self._queries_until,
            cu_seqlens_k=self._keys_until,
            max_seqlen_q=self._max_queries,
            max_seqlen_k=self._max_keys,
            softmax_scale=scaling,
            causal=True,
            # Keys to the left of a query's own, and to the right; -1: no limit.
            window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out[..., :width].unsqueeze(0)

    def _gather(self, states: torch.Tensor) -> torch.Tensor:
        return select_rows(states[0].transpose(0, 1), 0, self._key_index)


def _starts(lengths: list[int]) -> torch.Tensor:
    """[len + 1] int32, where each sequence starts and the last one ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
