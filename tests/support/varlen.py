"""What `flash_attn.flash_attn_varlen_func` computes, in plain torch on any device and dtype.

Written from its documentation: packed sequences, grouped heads, and, from version 2.1 on, a causal
mask and a window aligned to the lower right corner of each sequence's scores.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """Attend sequence by sequence; [queries, heads, head_dim] like q.

    Args:
        q: [queries, heads, head_dim]; k, v: [keys, kv_heads, head_dim].
        cu_seqlens_q, cu_seqlens_k: [sequences + 1] int32, starts of the sequences and the end.
        max_seqlen_q, max_seqlen_k: the longest of each.
        window_size: keys to the left and to the right of a query's own; -1: no limit.
    """
    assert dropout_p == 0.0
    assert q.shape[-1] == k.shape[-1] == v.shape[-1], "one head_dim"
    assert q.dtype == k.dtype == v.dtype, "one dtype"
    assert all(t.stride(-1) == 1 for t in (q, k, v)), "contiguous in the last dimension"
    for starts, longest, states in (
        (cu_seqlens_q, max_seqlen_q, q),
        (cu_seqlens_k, max_seqlen_k, k),
    ):
        assert starts.dtype == torch.int32
        assert starts[0] == 0
        assert starts[-1] == len(states)
        assert starts.diff().max() == longest
    repeats = q.shape[1] // k.shape[1]
    scale = softmax_scale if softmax_scale is not None else q.shape[-1] ** -0.5
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        query = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]
        key = k[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(repeats, dim=1)
        value = v[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].repeat_interleave(repeats, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        # Distance of a key to the right of the query's own place, counted from the last ones.
        own = torch.arange(len(query))[:, None] + len(key) - len(query)
        distance = torch.arange(len(key))[None] - own
        left, right = window_size
        hidden = torch.zeros(distance.shape, dtype=torch.bool)
        if causal:
            right = 0 if right < 0 else min(right, 0)
        if right >= 0:
            hidden |= distance > right
        if left >= 0:
            hidden |= distance < -left
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(outputs)
