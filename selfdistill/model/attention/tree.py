"""The attention function that transformers calls, the tree it is given, and the lent keys."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from selfdistill.errors import UserError
from selfdistill.model.attention.backend import BackendName, build_backend
from selfdistill.model.layout import PackedRow

IMPLEMENTATION = "selfdistill_prefix_tree"

# Arguments with which some families change the scores; fused kernels have no place for them.
_SCORE_ARGUMENTS = ("softcap", "s_aux", "sinks", "position_bias")


class UnsupportedModelError(UserError):
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
        """Copy one layer's borrowed positions; does nothing once closed (checkpoint replay).

        Raises:
            UnsupportedModelError: the layer has been captured already.
        """
        if self._open:
            if layer in self._layers:
                raise UnsupportedModelError(
                    f"layer {layer} attends more than once in a pass, so its keys cannot be lent "
                    "to the teacher: use a family without that"
                )
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


class PrefixTree:
    """The layout of one forward pass, handed to the model as the keyword `prefix_tree`.

    Args:
        row: the packed row.
        device: where the model computes.
        backend: who computes the scores.
        capture: fill this stash in the student's pass.
        borrow: read the borrowed keys from this stash in the teacher's pass.

    Attributes:
        windows: the sliding window that each layer asked for, by number of the layer.

    Raises:
        ValueError: the row borrows keys and no stash was given.
    """

    def __init__(
        self,
        row: PackedRow,
        *,
        device: torch.device,
        backend: BackendName = "loop",
        capture: PrefixStash | None = None,
        borrow: PrefixStash | None = None,
    ) -> None:
        num_borrowed = len(row.borrowed_index)
        if num_borrowed and borrow is None:
            raise ValueError(
                f"row borrows {num_borrowed} prefix tokens but no stash was given: pass the stash "
                "that the student's pass captured, or pack with share_student_prefix=False"
            )
        self.windows: dict[int, int | None] = {}
        self._capture = capture
        self._borrow = borrow if num_borrowed else None
        self._backend = build_backend(backend, row, device)

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
        self.windows[layer] = sliding_window
        # Under autocast rotary embeddings leave float32 queries and keys beside 16-bit values;
        # sdpa would round them itself, other kernels would refuse.
        query, key = query.to(value.dtype), key.to(value.dtype)
        if self._capture is not None:
            self._capture.capture(layer, key, value)
        if self._borrow is not None:
            prefix_key, prefix_value = self._borrow[layer]
            key = torch.cat([prefix_key.to(key.dtype), key], dim=2)
            value = torch.cat([prefix_value.to(value.dtype), value], dim=2)
        return self._backend.attend(
            query, key, value, scaling=scaling, sliding_window=sliding_window
        )


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
