"""Prefix-tree attention: many sequences with shared prefixes in one packed row, exactly.

Registered with transformers' `AttentionInterface` under `IMPLEMENTATION`. `enable_prefix_sharing`
sets it on a model once and for all: without a packed row it is plain `sdpa`, so generation and
evaluation are unchanged, and the replay of a checkpointed layer in the backward pass finds it still
in place. The tree travels as a model keyword, which reaches every layer, through PEFT and
checkpointed layers too; no key/value cache takes part.

Each segment of the row attends the keys before it (borrowed prefix, trunk) and its own under a
lower-right causal mask. Gathering those keys repeats the prefix for every branch, and autograd sums
their gradients over the branches: the prefix is read once but trained by all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from selfdistill.layout import PackedRow, PromptGroup, Segment, pack_groups

IMPLEMENTATION = "selfdistill_prefix_tree"

# One more attention call costs about as much as this many query-key pairs (measured forward and
# backward on one CPU core at 6 heads of 32 and 9 heads of 64: 0.7 ms against 75 ns a pair).
_CALL_COST_PAIRS = 8192
# Larger batches save nothing more and hold a larger mask and a larger copy of the prefix keys.
_MAX_BATCH_PAIRS = 1 << 21

_SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments with which some families change the scores; `sdpa` kernels have no place for them.
_SCORE_ARGUMENTS = ("softcap", "s_aux", "sinks", "position_bias")


class UnsupportedModelError(ValueError):
    """The model's architecture cannot share prefixes exactly."""


class PrefixStash:
    """Keys and values of the student's prompt prefixes, layer by layer, without gradient.

    It holds a copy of the borrowed positions only, [1, kv_heads, borrowed, head_dim] each, never a
    view that would keep the student's whole row alive.

    Args:
        index: [borrowed] int64, positions in the student's row.
    """

    def __init__(self, index: torch.Tensor) -> None:
        self._index = index
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._open = True

    def capture(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Copy one layer's borrowed positions; does nothing once closed (checkpoint replay)."""
        if self._open:
            index = self._index.to(key.device)
            self._layers[layer] = (
                key.detach().index_select(2, index),
                value.detach().index_select(2, index),
            )

    def close(self) -> None:
        """End the capture: a replay of the student's layers must not write again."""
        self._open = False

    def free(self) -> None:
        """Release the tensors; checkpointed layers keep the stash itself alive until backward."""
        self._layers.clear()

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[layer]

    def __len__(self) -> int:
        return len(self._layers)


@dataclass
class _Batch:
    """Segments that one attention call serves, padded to the longest of them.

    A padded query repeats the segment's last token, so every query sees at least one key.
    """

    size: int
    query_index: torch.Tensor  # [size * queries], into the row
    key_index: torch.Tensor  # [size * keys], into borrowed + row
    query_position: torch.Tensor  # [size or 1, queries]
    num_keys: int
    causal: bool  # no keys but its own: the square causal kernel applies
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)

    def mask(self, sliding_window: int | None, repeats: int) -> torch.Tensor:
        """Return the lower-right causal mask, [size or 1, 1, repeats * queries, keys] bool."""
        if (sliding_window, repeats) not in self.masks:
            position = self.query_position[:, None, :, None]
            key = torch.arange(self.num_keys, device=position.device)
            mask = key <= position
            if sliding_window is not None:
                mask &= key > position - sliding_window
            self.masks[sliding_window, repeats] = mask.repeat(1, 1, repeats, 1)
        return self.masks[sliding_window, repeats]

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
            # The query heads of one key head become more queries: faster than repeating the keys,
            # and fused kernels take a mask together with grouped heads only in this form.
            folded = q.reshape(self.size, k.shape[1], -1, q.shape[-1])
            mask = self.mask(sliding_window, repeats)
            out = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scaling)
            out = out.reshape(*q.shape[:-1], v.shape[-1])
        return out.transpose(1, 2).flatten(0, 1)

    def _gather(self, states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        heads, _, head_dim = states.shape
        return states.index_select(1, index).view(heads, self.size, -1, head_dim).transpose(0, 1)


class PrefixTree:
    """The layout of one forward pass, handed to the model as the keyword `prefix_tree`.

    Args:
        row: the packed row.
        device: where the model computes.
        capture: fill this stash in the student's pass.
        borrow: read the borrowed keys from this stash in the teacher's pass.
    """

    def __init__(
        self,
        row: PackedRow,
        *,
        device: torch.device,
        capture: PrefixStash | None = None,
        borrow: PrefixStash | None = None,
    ) -> None:
        num_borrowed = len(row.borrowed_index)
        if num_borrowed and borrow is None:
            raise ValueError(
                f"row borrows {num_borrowed} prefix tokens but no stash was given: pass the stash "
                "that the student's pass captured, or pack with share_student_prefix=False"
            )
        self._capture = capture
        self._borrow = borrow if num_borrowed else None
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
            self._batches.append(_make_batch(segments, num_borrowed, device))
        self._order = order.to(device)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attend within one layer; [1, heads, L, head_dim] gives [1, L, heads, head_dim]."""
        if self._capture is not None:
            self._capture.capture(layer, key, value)
        if self._borrow is not None:
            prefix_key, prefix_value = self._borrow[layer]
            key = torch.cat([prefix_key.to(key.dtype), key], dim=2)
            value = torch.cat([prefix_value.to(value.dtype), value], dim=2)
        outputs = [
            batch.attend(query[0], key[0], value[0], scaling=scaling, sliding_window=sliding_window)
            for batch in self._batches
        ]
        return torch.cat(outputs).index_select(0, self._order).unsqueeze(0)


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
        query_index += _pad(segment.own, queries)
        own = [num_borrowed + i for part in (segment.trunk, segment.own) for i in part]
        key_index += _pad([*segment.borrowed, *own], keys)
        first = segment.num_keys - len(segment.own)
        query_position.append(_pad(range(first, segment.num_keys), queries))
    if all(row == query_position[0] for row in query_position):
        query_position = query_position[:1]
    return _Batch(
        size=len(segments),
        query_index=torch.tensor(query_index, device=device),
        key_index=torch.tensor(key_index, device=device),
        query_position=torch.tensor(query_position, device=device),
        num_keys=keys,
        causal=all(map(_is_root, segments)),
    )


def _pad(values: Iterable[int], length: int) -> list[int]:
    values = list(values)
    return values + values[-1:] * (length - len(values))


def prefix_tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    prefix_tree: PrefixTree | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for `AttentionInterface`: prefix-tree with a tree, `sdpa` without.

    Args:
        query: [batch, heads, L, head_dim].
        key, value: [batch, kv_heads, L, head_dim].
        attention_mask, dropout: used by `sdpa` only; a tree knows its own masks and drops nothing.

    Returns:
        [batch, L, heads, head_dim] and None (no attention weights).

    Raises:
        UnsupportedModelError: the layer changes its scores in a way that no fused kernel offers.
    """
    if prefix_tree is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **kwargs,
        )
    for name in _SCORE_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name} to its attention, which prefix-tree "
                "attention does not compute: use a family without it"
            )
    layer = cast(int, module.layer_idx)
    out = prefix_tree.attend(
        layer, query, key, value, scaling=scaling, sliding_window=sliding_window
    )
    return out, None


AttentionInterface.register(IMPLEMENTATION, prefix_tree_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def base_causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"model is a {type(inner).__name__}, expected a transformers PreTrainedModel or a PEFT "
            "wrapper of one"
        )
    return inner


def run_packed_row(
    model: torch.nn.Module,
    row: PackedRow,
    *,
    capture: PrefixStash | None = None,
    borrow: PrefixStash | None = None,
) -> torch.Tensor:
    """Run the decoder (no lm_head, no logits) over a packed row.

    Args:
        model: a causal LM on which `enable_prefix_sharing` was called.
        row: the packed row.
        capture: stash to fill with the keys and values of the prefixes, closed on return.
        borrow: stash that holds `row`'s borrowed keys and values.

    Returns:
        [T, H] the final hidden states at `row.prediction_index`, in the model's dtype.

    Raises:
        ValueError: the model does not use prefix-tree attention.
    """
    decoder = base_causal_lm(model).get_decoder()
    if decoder.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"model uses {decoder.config._attn_implementation!r} attention, expected "
            f"{IMPLEMENTATION!r}: call enable_prefix_sharing(model) once, before training"
        )
    device = decoder.device
    output = decoder(
        input_ids=row.input_ids.to(device),
        position_ids=row.position_ids.to(device),
        # A mask of four dimensions is passed on as it is, so none is built. Ours ignores it; any
        # other attention would turn it into NaN instead of a silently wrong result.
        attention_mask=torch.full((1, 1, 1, 1), torch.nan, dtype=decoder.dtype, device=device),
        use_cache=False,
        prefix_tree=PrefixTree(row, device=device, capture=capture, borrow=borrow),
    )
    if capture is not None:
        capture.close()
    return output.last_hidden_state[0].index_select(0, row.prediction_index.to(device))


def enable_prefix_sharing(model: torch.nn.Module) -> None:
    """Set prefix-tree attention on a model, after checking that it is exact there.

    Everything else that the model does goes on as with `sdpa` attention.

    Raises:
        UnsupportedModelError: see `check_model_supports_prefix_sharing`.
    """
    base = base_causal_lm(model)
    if base.get_decoder().config._attn_implementation != IMPLEMENTATION:
        check_model_supports_prefix_sharing(model)
        base.set_attn_implementation(IMPLEMENTATION)


def check_model_supports_prefix_sharing(model: torch.nn.Module) -> None:
    """Raise early, with the reason, when a model cannot share prefixes exactly.

    First the configuration is read, then the model itself is asked: two short branches of one
    prefix, packed, must have the hidden states that they have alone.

    Raises:
        UnsupportedModelError: recurrent, convolutional, chunked or bidirectional layers, attention
            that changes its scores, rotary embeddings that depend on the length of the row, layers
            that reuse another layer's keys, or a measured difference.
    """
    base = base_causal_lm(model)
    reason = _unsupported_reason(base)
    if reason is not None:
        raise UnsupportedModelError(f"{type(base).__name__} cannot share prefixes: {reason}")
    error = _probe_error(base)
    # The hidden states are relative to their largest entry; half precision rounds at 2^-8.
    tolerance = 1e-3 if base.dtype == torch.float32 else 5e-2
    if not error <= tolerance:
        raise UnsupportedModelError(
            f"{type(base).__name__} cannot share prefixes: packed hidden states differ from "
            f"separate ones by {error:.1e} (relative), expected at most {tolerance:.0e}; some "
            "layer mixes tokens outside its attention function"
        )


def _unsupported_reason(model: PreTrainedModel) -> str | None:
    config = model.get_decoder().config
    if not model._can_set_attn_implementation():
        return "its attention cannot be replaced through AttentionInterface"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state, which one row cannot hold for several branches"
    if config.is_encoder_decoder or getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    others = set(getattr(config, "layer_types", None) or ()) - _SUPPORTED_LAYER_TYPES
    if others:
        return (
            f"config.layer_types has {sorted(others)}, supported: {sorted(_SUPPORTED_LAYER_TYPES)}"
        )
    for name in ("attn_logit_softcapping", "num_kv_shared_layers"):
        if getattr(config, name, None):
            return f"config.{name} is {getattr(config, name)}, supported: none"
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    for rope_type in (parameters.get("rope_type") for parameters in nested):
        if rope_type in ("dynamic", "longrope"):
            return f"rope_type {rope_type!r} depends on the length of the row"
    return None


@torch.no_grad()
def _probe_error(model: PreTrainedModel) -> float:
    """Largest difference between packed and separate hidden states, over the largest entry."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    prompt, completions = [1, 2, 3, 4], [[5, 6, 7, 8], [9, 10, 11]]
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt = [token % vocabulary for token in prompt]
    completions = [[token % vocabulary for token in tokens] for tokens in completions]
    group = PromptGroup(prompt, [prompt] * len(completions), completions)
    separate = torch.cat(
        [
            decoder(
                input_ids=torch.tensor([prompt + tokens[:-1]], device=decoder.device),
                use_cache=False,
            ).last_hidden_state[0, len(prompt) - 1 :]
            for tokens in completions
        ]
    )
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        row = pack_groups([group], share_student_prefix=False).student
        packed = run_packed_row(model, row)
    finally:
        model.set_attn_implementation(before)
    return ((packed - separate).abs().max() / separate.abs().max()).item()
