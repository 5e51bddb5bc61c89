"""One packed row through a model."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from selfdistill.model.attention.backend import Choice, choose_backend
from selfdistill.model.attention.tree import IMPLEMENTATION, PrefixStash, PrefixTree
from selfdistill.model.float32_sum import select_rows
from selfdistill.model.layout import PackedRow
from selfdistill_kernels.integrations.heads import causal_lm


def run_packed_row(
    model: torch.nn.Module,
    row: PackedRow,
    *,
    capture: PrefixStash | None = None,
    borrow: PrefixStash | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Run the decoder (no lm_head, no logits) over a packed row.

    Args:
        model: a causal LM on which `enable_prefix_sharing` was called.
        row: the packed row.
        capture: stash to fill with the keys and values of the prefixes, closed on return.
        borrow: stash that holds `row`'s borrowed keys and values.
        backend: who computes the attention, see `choose_backend`.

    Returns:
        [T, H] the final hidden states at `row.prediction_index`, in the model's dtype.

    Raises:
        ValueError: the model does not use prefix-tree attention, or the backend is unknown.
        UnavailableBackendError: the backend that was asked for cannot run.
    """
    decoder = causal_lm(model).get_decoder()
    if decoder.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"model uses {decoder.config._attn_implementation!r} attention, expected "
            f"{IMPLEMENTATION!r}: call enable_prefix_sharing(model) once, before training"
        )
    device = decoder.device
    tree = PrefixTree(
        row,
        device=device,
        backend=backend_for(model, backend).name,
        capture=capture,
        borrow=borrow,
    )
    hidden = run_tree(decoder, row, tree)
    if capture is not None:
        capture.close()
    return select_rows(hidden, 0, row.prediction_index.to(device))


def run_tree(decoder: PreTrainedModel, row: PackedRow, tree: PrefixTree) -> torch.Tensor:
    """[L, H], the final hidden states of the whole row."""
    device = decoder.device
    output = decoder(
        input_ids=row.input_ids.to(device),
        position_ids=row.position_ids.to(device),
        # A mask of four dimensions is passed on as it is, so none is built. Ours ignores it; any
        # other attention would turn it into NaN instead of a silently wrong result.
        attention_mask=torch.full((1, 1, 1, 1), torch.nan, dtype=decoder.dtype, device=device),
        use_cache=False,
        prefix_tree=tree,
    )
    return output.last_hidden_state[0]


def compute_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the dtype of matrix products: autocast's where it is on, else the model's."""
    decoder = causal_lm(model).get_decoder()
    device = decoder.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else decoder.dtype


def backend_for(model: torch.nn.Module, requested: str = "auto") -> Choice:
    """Return the attention backend that serves a model where it is and as it computes now.

    Raises:
        ValueError: there is no such backend.
        UnavailableBackendError: the requested one cannot run.
    """
    decoder = causal_lm(model).get_decoder()
    return choose_backend(
        requested,
        device=decoder.device.type,
        dtype=compute_dtype(model),
        head_dim=_head_dim(decoder.config),
    )


def layer_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return the configuration of each layer; most families have the same one for all."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * config.num_hidden_layers


def _head_dim(config: PretrainedConfig) -> int:
    """Return the largest head_dim of queries and keys; latent attention has another for values."""
    return max(
        getattr(layer, "qk_head_dim", None)
        or getattr(layer, "head_dim", None)
        or layer.hidden_size // layer.num_attention_heads
        for layer in layer_configs(config)
    )
