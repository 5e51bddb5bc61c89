"""Keys and values of rows that are sampled together, in tensors that are written in place.

A cache that grows by concatenation copies everything for every token. Here each layer has slabs
with room for more rows and tokens; they are made anew only when there is none left.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# New slabs have room for this share of what they hold, so that few are made.
_SPARE = 0.5


class SlabCache(Cache):
    """A transformers cache whose rows come and go; every row ends in the last slot that is used.

    Rows of fewer tokens begin with empty slots, which are zero and need a mask. Slots that are
    empty in all rows are given up when slabs are made anew.

    Args:
        config: of a model that `supports` admits.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        kinds = DynamicCache(config=config).layers
        super().__init__(layers=[_SlabLayer(is_sliding=kind.is_sliding) for kind in kinds])

    @staticmethod
    def supports(config: PreTrainedConfig) -> bool:
        """Return whether all that a model remembers are keys and values of its own layers.

        Recurrent states, layers that read another layer's keys, and windows in fixed chunks are
        something else.
        """
        if getattr(config.get_text_config(decoder=True), "attention_chunk_size", None) is not None:
            return False
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
        return kinds <= {DynamicLayer, DynamicSlidingWindowLayer}

    @property
    def width(self) -> int:
        """Slots in use."""
        return int(self.get_seq_length())

    def enter(self, prompts: DynamicCache, *, width: int, repeats: int, rows: int) -> None:
        """Add rows, each prompt's `repeats` times.

        Args:
            prompts: what the model remembers of `width` slots, the prompts at their end.
            width: of the longest prompt.
            repeats: rows of each prompt.
            rows: how many rows there may soon be; slabs that are made now have room for them.
        """
        for layer, prompt in zip(self.layers, prompts.layers, strict=True):
            layer.enter(prompt.keys, prompt.values, width=width, repeats=repeats, rows=rows)

    def make_room(self, longest: int, *, rows: int) -> None:
        """Make sure that one more slot can be written.

        Args:
            longest: most tokens that a row holds.
            rows: see `enter`.
        """
        for layer in self.layers:
            layer.make_room(longest, rows=rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` in this order; rows that keep their place are not copied."""
        moved = indices != torch.arange(len(indices), device=indices.device)
        for layer in self.layers:
            layer.select(indices[moved], moved.nonzero()[:, 0], rows=len(indices))


class _SlabLayer(DynamicLayer):
    """`keys` and `values` are the used part of two slabs, [rows, heads, slots, head_dim]."""

    keys: Tensor
    values: Tensor

    def __init__(self, *, is_sliding: bool) -> None:
        super().__init__()
        # A window is a matter of the mask: it is made over all slots, as for a whole sequence.
        self.is_sliding = is_sliding
        self._slabs: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of new tokens behind those of all rows; return all states."""
        rows, used = self.keys.shape[0], self.keys.shape[2]
        stop = used + key_states.shape[2]
        for slab, states in zip(self._slabs, (key_states, value_states), strict=True):
            slab[:rows, :, used:stop] = states
        self._show(rows, stop)
        return self.keys, self.values

    def enter(self, keys: Tensor, values: Tensor, *, width: int, repeats: int, rows: int) -> None:
        """See `SlabCache.enter`; a sliding window may have kept less than `width` of its prompt."""
        held, used = (self.keys.shape[0], self.keys.shape[2]) if self._slabs else (0, 0)
        entering = len(keys) * repeats
        if not self._slabs:
            self.dtype, self.device = keys.dtype, keys.device
            self.keys, self.values = keys[:0], values[:0]
            self.is_initialized = True
        if not self._slabs or held + entering > len(self._slabs[0]) or width > used:
            self._remake(max(rows, held + entering), max(used, width), used=used)
        used = max(used, width)
        for slab, states in zip(self._slabs, (keys, values), strict=True):
            new = slab[held : held + entering, :, :used]
            start = used - states.shape[2]
            new[:, :, :start] = 0
            new[:, :, start:] = states.repeat_interleave(repeats, 0)
        self._show(held + entering, used)

    def make_room(self, longest: int, *, rows: int) -> None:
        """See `SlabCache.make_room`."""
        used = self.keys.shape[2]
        if used == self._slabs[0].shape[2]:
            self._remake(max(rows, len(self.keys)), longest, used=used)

    def select(self, sources: Tensor, places: Tensor, *, rows: int) -> None:
        """Copy rows `sources` to `places`, which are others, and keep the first `rows`."""
        if len(sources):
            for states in (self.keys, self.values):
                states[places] = states[sources]
        self._show(rows, self.keys.shape[2])

    def _remake(self, rows: int, width: int, *, used: int) -> None:
        """Make slabs of `rows` whose first `width` slots end with the last ones of those in use."""
        kept, slots = min(used, width), width + max(1, int(width * _SPARE))
        slabs = []
        for states in (self.keys, self.values):
            held, heads, _, head_dim = states.shape
            slab = states.new_empty(rows, heads, slots, head_dim)
            slab[:held, :, : width - kept] = 0
            slab[:held, :, width - kept : width] = states[:, :, used - kept : used]
            slabs.append(slab)
        self._slabs = slabs
        self._show(self.keys.shape[0], width)

    def _show(self, rows: int, width: int) -> None:
        self.keys, self.values = (slab[:rows, :, :width] for slab in self._slabs)
