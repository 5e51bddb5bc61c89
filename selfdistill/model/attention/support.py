"""Which models can share prefixes exactly: their configuration is read, then they are asked.

A model that cannot is refused by name before training starts, never trained on wrong numbers.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from selfdistill.model.attention.backend import BackendName
from selfdistill.model.attention.model import (
    backend_for,
    compute_dtype,
    layer_configs,
    run_tree,
)
from selfdistill.model.attention.tree import (
    IMPLEMENTATION,
    PrefixStash,
    PrefixTree,
    UnsupportedModelError,
)
from selfdistill.model.layout import PromptGroup, pack_groups
from selfdistill_kernels.integrations.heads import causal_lm

_SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def enable_prefix_sharing(model: torch.nn.Module, *, backend: str = "auto") -> None:
    """Set prefix-tree attention on a model, after checking that it is exact there.

    Everything else that the model does goes on as with `sdpa` attention.

    Args:
        model: a transformers causal LM, or a PEFT wrapper of one.
        backend: who computes in the check.

    Raises:
        UnsupportedModelError: see `check_model_supports_prefix_sharing`.
        UnavailableBackendError: the backend that was asked for cannot run.
    """
    base: PreTrainedModel = causal_lm(model)
    if base.get_decoder().config._attn_implementation != IMPLEMENTATION:
        check_model_supports_prefix_sharing(model, backend=backend)
        base.set_attn_implementation(IMPLEMENTATION)


def check_model_supports_prefix_sharing(model: torch.nn.Module, *, backend: str = "auto") -> None:
    """Raise early, with the reason, when a model cannot share prefixes exactly.

    First the configuration is read, then the model itself is asked: two short branches of one
    prefix, packed for the student and for a teacher that borrows, must have the hidden states that
    they have alone, and every layer must hand its sliding window to its attention (a window that
    lies in a mask only would be lost).

    Args:
        model: a transformers causal LM, or a PEFT wrapper of one, as it will train: on its device,
            under the autocast, if any.
        backend: who computes the packed attention, see `choose_backend`.

    Raises:
        UnsupportedModelError: recurrent, convolutional, chunked or bidirectional layers, attention
            that changes its scores, rotary embeddings that depend on the length of the row, layers
            that reuse another layer's keys, or a measured difference.
        UnavailableBackendError: the backend that was asked for cannot run.
    """
    base: PreTrainedModel = causal_lm(model)
    reason = _unsupported_reason(base)
    if reason is None:
        reason = _probe(base, backend_for(base, backend).name)
        # Under autocast torch before 2.11 keeps weights that were cast without a gradient, and the
        # pass that trains would take those.
        torch.clear_autocast_cache()
    if reason is not None:
        raise UnsupportedModelError(f"{type(base).__name__} cannot share prefixes: {reason}")


def _unsupported_reason(model: PreTrainedModel) -> str | None:
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder: its prompt is not part of the decoder's row"
    if not isinstance(model.get_decoder(), PreTrainedModel):
        return f"its decoder is a {type(model.get_decoder()).__name__}, not a model that runs alone"
    config = model.get_decoder().config
    if not model._can_set_attn_implementation():
        return "its attention cannot be replaced through AttentionInterface"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state, which one row cannot hold for several branches"
    if getattr(config, "use_bidirectional_attention", False):
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
def _probe(model: PreTrainedModel, backend: BackendName) -> str | None:
    """Run a short step of student and borrowing teacher; return what is wrong with it, or None."""
    decoder = model.get_decoder()
    before = decoder.config._attn_implementation
    vocabulary = model.get_input_embeddings().num_embeddings
    prompt, first_context, second_context, *completions = (
        [token % vocabulary for token in tokens]
        for tokens in ([1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8, 9, 5], [10, 11, 12])
    )
    group = PromptGroup(prompt, [first_context, second_context], completions)

    # What the model says about each sequence alone, before its attention is replaced.
    def separate(prompts: list[list[int]]) -> torch.Tensor:
        hidden = []
        for before_completion, completion in zip(prompts, completions, strict=True):
            ids = torch.tensor([before_completion + completion[:-1]], device=decoder.device)
            output = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
            hidden.append(output[len(before_completion) - 1 :])
        return torch.cat(hidden)

    expected = separate([prompt, prompt]), separate(group.teacher_prompts)
    # The same sequences in two packed rows; its own attention is put back whatever happens.
    pack = pack_groups([group], share_student_prefix=True)
    assert pack.teacher is not None  # asked for by default
    stash = PrefixStash(pack.teacher.borrowed_index)
    student = PrefixTree(pack.student, device=decoder.device, backend=backend, capture=stash)
    teacher = PrefixTree(pack.teacher, device=decoder.device, backend=backend, borrow=stash)
    packed = []
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        for row, tree in ((pack.student, student), (pack.teacher, teacher)):
            hidden = run_tree(decoder, row, tree)
            if not tree.windows:
                return "its layers do not call the attention set through AttentionInterface"
            packed.append(hidden.index_select(0, row.prediction_index.to(hidden.device)))
    finally:
        model.set_attn_implementation(before)
    # Relative to the largest hidden state; half precision rounds at 2^-8.
    tolerance = 1e-3 if compute_dtype(model).itemsize >= 4 else 5e-2
    for got, alone in zip(packed, expected, strict=True):
        error = ((got - alone).abs().max() / alone.abs().max()).item()
        if not error <= tolerance:
            return (
                f"packed hidden states differ from separate ones by {error:.1e} (relative), "
                f"expected at most {tolerance:.0e}; some layer mixes tokens in another way than "
                "causal attention"
            )
    # The sequences are shorter than most windows, so numbers alone would not tell that one is lost.
    for layer, window in enumerate(_windows(decoder.config)):
        if student.windows.get(layer, window) != window:
            return (
                f"layer {layer} has a sliding window of {window} by its configuration but hands "
                f"{student.windows[layer]} to its attention"
            )
    return None


def _windows(config: PretrainedConfig) -> list[int | None]:
    """Return the sliding window that the configuration gives to each layer."""
    layers = layer_configs(config)
    windows = [getattr(layer, "sliding_window", None) for layer in layers]
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    return [
        window if kind == "sliding_attention" else None
        for window, kind in zip(windows, kinds, strict=True)
    ]
