"""Runs anywhere: one `scaled_dot_product_attention` call for segments of similar shape.

The other backends are compared with this one. Each segment attends the keys before it (borrowed
prefix, trunk) and its own under a lower-right causal mask. Gathering those keys repeats the prefix
for every branch, and their gradients are summed over the branches: the prefix is read once but
trained by all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from selfdistill.model.float32_sum import select_rows
from selfdistill.model.layout import PackedRow, Segment

# One more attention call costs about as much as this many query-key pairs (measured forward and
# backward on one CPU core at 6 heads of 32 and 9 heads of 64: 0.7 ms against 75 ns a pair).
_CALL_COST_PAIRS = 8192
# The gradient of a slice of keys and values is written into zeros and added to those of the others:
# about this many pairs a key (estimated from a profile of 640 keys on one core).
_SLICED_KEY_PAIRS = 14
# Larger batches save nothing more and hold a larger mask and a larger copy of the prefix keys.
_MAX_BATCH_PAIRS = 1 << 21


class LoopAttention:
    """Attention over one row, batch of segments after batch of segments.

    Args:
        row: the packed row.
        device: where the model computes.
    """

    def __init__(self, row: PackedRow, device: torch.device) -> None:
        self._batches = []
        # Row position -> place of its output among the outputs of all batches.
        order = torch.empty(row.input_ids.shape[1], dtype=torch.int64)
        done = 0
        for segments in _partition(row.segments):
            queries = max(len(segment.own) for segment in segments)
            for i, segment in enumerate(segments):
                place = done + i * queries
                order[segment.own.start : segment.own.stop] = torch.arange(
                    place, place + len(segment.own)
                )
            done += len(segments) * queries
            self._batches.append(_make_batch(segments, len(row.borrowed_index), device))
        self._order = order.to(device)

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
        outputs = [
            batch.attend(query[0], key[0], value[0], scaling=scaling, sliding_window=sliding_window)
            for batch in self._batches
        ]
        return torch.cat(outputs).index_select(0, self._order).unsqueeze(0)


class _Run(NamedTuple):
    """Some of a batch's queries, and the keys from the first to the last that any of them sees."""

    num_queries: int
    keys: slice
    mask: torch.Tensor  # [size or 1, 1, repeats * num_queries, keys] bool


@dataclass
class _Batch:
    """Segments that one gather serves, padded to the longest of them.

    A padded query repeats the segment's last token, so every query sees at least one key.
    """

    size: int
    query_index: torch.Tensor  # [size * queries], into the row
    key_index: torch.Tensor  # [size * keys], into borrowed + row
    query_position: torch.Tensor  # [size or 1, queries], on the CPU
    num_keys: int
    causal: bool  # no keys but its own: the square causal kernel applies
    runs: dict[tuple[int | None, int], list[_Run]] = field(default_factory=dict)

    def masked_runs(self, sliding_window: int | None, repeats: int) -> list[_Run]:
        """Cut the queries into runs, so that fewer keys are computed only to be masked.

        Args:
            sliding_window: most keys that one query sees; None: all.
            repeats: query heads of one key head, laid one after another along the queries.
        """
        if (sliding_window, repeats) not in self.runs:
            self.runs[sliding_window, repeats] = [
                self._run(queries, sliding_window, repeats)
                for queries in _cut(self.query_position.shape[1], self.num_keys, self.size)
            ]
        return self.runs[sliding_window, repeats]

    def _run(self, queries: slice, sliding_window: int | None, repeats: int) -> _Run:
        position = self.query_position[:, queries]
        start = 0
        if sliding_window is not None:
            start = max(0, int(position.min()) - sliding_window + 1)
        keys = slice(start, int(position.max()) + 1)
        key = torch.arange(keys.start, keys.stop)
        mask = key <= position[:, :, None]
        if sliding_window is not None:
            mask &= key > position[:, :, None] - sliding_window
        mask = mask[:, None].repeat(1, 1, repeats, 1)
        return _Run(position.shape[1], keys, mask.to(self.query_index.device))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attend within one layer.

        Args:
            query: [heads, L, head_dim] of the whole row.
            key, value: [kv_heads, borrowed + L, head_dim].
            scaling: of the scores; None: 1 / sqrt(head_dim).
            sliding_window: most keys that one query sees, itself included; None: all.

        Returns:
            [size * queries, heads, head_dim], padding included.
        """
        q = self._gather(query, self.query_index)
        k = self._gather(key, self.key_index)
        v = self._gather(value, self.key_index)
        repeats = q.shape[1] // k.shape[1]
        if self.causal and (sliding_window is None or self.num_keys <= sliding_window):
            out = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=repeats > 1
            )
        else:
            outputs = []
            runs = self.masked_runs(sliding_window, repeats)
            parts = q.split([run.num_queries for run in runs], dim=2)
            for part, (_, keys, mask) in zip(parts, runs, strict=True):
                # The query heads of one key head become more queries: faster than repeating the
                # keys, and fused kernels take a mask with grouped heads only in this form.
                folded = part.reshape(self.size, k.shape[1], -1, q.shape[-1])
                result = scaled_dot_product_attention(
                    folded, k[:, :, keys], v[:, :, keys], attn_mask=mask, scale=scaling
                )
                outputs.append(result.reshape(*part.shape[:-1], v.shape[-1]))
            out = torch.cat(outputs, dim=2)
        return out.transpose(1, 2).flatten(0, 1)

    def _gather(self, states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        heads, _, head_dim = states.shape
        rows = select_rows(states, 1, index)
        return rows.view(heads, self.size, -1, head_dim).transpose(0, 1)


def _cut(queries: int, keys: int, size: int) -> list[slice]:
    """Even runs, as many as pay: n of them compute size * queries^2 / 2n pairs in vain.

    Each costs a call and the gradients of its slices of the keys.
    """
    cost = max(1, _CALL_COST_PAIRS + _SLICED_KEY_PAIRS * size * keys)
    count = round(queries * math.sqrt(size / (2 * cost)))
    length = math.ceil(queries / max(1, count))
    return [slice(start, min(start + length, queries)) for start in range(0, queries, length)]


def _partition(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Group segments of similar shape while the padding costs less than one more call."""

    def pairs(batch: Sequence[Segment]) -> int:
        queries = max(len(segment.own) for segment in batch)
        return len(batch) * queries * max(segment.num_keys for segment in batch)

    batches: list[list[Segment]] = []
    # Segments that attend nothing but themselves go to the causal kernel, which needs no mask.
    for segment in sorted(segments, key=lambda s: (_is_root(s), len(s.own), s.num_keys)):
        if batches:
            merged = [*batches[-1], segment]
            same_kind = _is_root(segment) == _is_root(batches[-1][0])
            cost = pairs(merged)
            padding = cost - pairs(batches[-1]) - pairs([segment])
            if same_kind and cost <= _MAX_BATCH_PAIRS and padding <= _CALL_COST_PAIRS:
                batches[-1] = merged
                continue
        batches.append([segment])
    return batches


def _is_root(segment: Segment) -> bool:
    return segment.num_keys == len(segment.own)


def _make_batch(segments: Sequence[Segment], num_borrowed: int, device: torch.device) -> _Batch:
    queries = max(len(segment.own) for segment in segments)
    keys = max(segment.num_keys for segment in segments)
    query_index, key_index, query_position = [], [], []
    for segment in segments:
        own = torch.arange(segment.own.start, segment.own.stop)
        query_index.append(_pad(own, queries))
        key_index.append(_pad(segment.key_index(num_borrowed), keys))
        query_position.append(_pad(segment.num_keys - len(own) + torch.arange(len(own)), queries))
    if all(torch.equal(positions, query_position[0]) for positions in query_position):
        query_position = query_position[:1]
    return _Batch(
        size=len(segments),
        query_index=torch.cat(query_index).to(device),
        key_index=torch.cat(key_index).to(device),
        query_position=torch.stack(query_position),
        num_keys=keys,
        causal=all(map(_is_root, segments)),
    )


def _pad(values: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([values, values[-1:].expand(length - len(values))])
