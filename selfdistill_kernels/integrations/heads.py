"""The head of a language model: what lies between its last hidden states and its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from selfdistill_kernels.arguments.checks import FLOATS


class UnsupportedHeadError(ValueError):
    """The model makes its logits in a way that the fused losses do not know."""


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to the scores of a head: scale * (h A^T) B^T.

    Attributes:
        a: [r, H]. b: [V, r]. scale: alpha / r, or alpha / sqrt(r).
    """

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class HeadValues:
    """A head as it is at one moment; see `Head`.

    Attributes:
        weight: [V, H], without what adapters add. bias: [V] or None.
        logit_scale, softcap: as in `Head`.
        low_rank: what active LoRA adapters add to the scores.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    low_rank: tuple[LowRank, ...] = ()

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] as logits [..., V], by the plain operations of torch."""
        scores = nn.functional.linear(hidden, self.weight, self.bias)
        for part in self.low_rank:
            down = nn.functional.linear(hidden.to(part.a.dtype), part.a) * part.scale
            scores = scores + nn.functional.linear(down, part.b).to(scores.dtype)
        if self.logit_scale != 1.0:
            scores = scores * self.logit_scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        return scores


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: cap(logit_scale * (h W^T + b)).

    W, b and adapters are read when they are asked for, so that a head may be kept while weights are
    trained, adapters switched and shards gathered.

    Attributes:
        layer: holds W and b; may be wrapped by peft.
        logit_scale: multiplies the scores, bias included, before the cap.
        softcap: c of c * tanh(z / c), or None.
        tied: W is also the input embedding.
    """

    layer: nn.Module
    logit_scale: float = 1.0
    softcap: float | None = None
    tied: bool = False

    @property
    def weight(self) -> Tensor:
        """[V, H], the model's own parameter, without what adapters add (see `low_rank`); a DTensor
        where the head is sharded.

        Raises:
            UnsupportedHeadError: a quantised head, or an adapter other than LoRA.
        """
        base = _without_adapter(self.layer)
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor):
            raise UnsupportedHeadError(
                f"the head is a {type(base).__name__} without a weight tensor, as quantised layers "
                "are; load the model with its lm_head left in float32, bfloat16 or float16"
            )
        # A FakeTensor stands for a plain one while torch.export looks at the model.
        is_known = type(weight) in (Tensor, nn.Parameter, DTensor, FakeTensor)
        if weight.dtype not in FLOATS or not is_known:
            raise UnsupportedHeadError(
                f"the head's weight is a {type(weight).__name__} of {weight.dtype}: quantised "
                "heads are not supported; leave lm_head out of the quantisation (for bitsandbytes "
                "llm_int8_skip_modules=['lm_head'], for torchao modules_to_not_convert)"
            )
        return weight

    @property
    def bias(self) -> Tensor | None:
        """[V] or None."""
        return cast("Tensor | None", getattr(_without_adapter(self.layer), "bias", None))

    @property
    def low_rank(self) -> tuple[LowRank, ...]:
        """What active LoRA adapters add to the scores; empty without adapters, while they are
        disabled, and when they are merged into the weight.

        Raises:
            UnsupportedHeadError: DoRA and other variants, a LoRA bias, dropout in training, or
                adapters on a head in shards.
        """
        layer: Any = self.layer
        if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
            return ()
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if active and isinstance(self.weight, DTensor):
            raise UnsupportedHeadError(
                f"adapter {active[0]!r} is on a head whose weight is a DTensor with placements "
                f"{self.weight.placements}; leave lm_head out of target_modules, or whole"
            )
        for name in active:
            dropout = layer.lora_dropout[name]
            problem = (
                "is a variant of LoRA" if name in layer.lora_variant
                else "has a bias" if layer.lora_bias.get(name)
                else "has dropout" if layer.training and getattr(dropout, "p", 0.0) > 0.0
                else None
            )  # fmt: skip
            if problem is not None:
                raise UnsupportedHeadError(
                    f"adapter {name!r} on the head {problem}, which the fused loss cannot follow; "
                    "use plain LoRA without bias and dropout there, or leave lm_head out of "
                    "target_modules"
                )
        return tuple(
            LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
            for name in active
        )

    @property
    def values(self) -> HeadValues:
        """Everything at once, as it is now.

        Raises:
            UnsupportedHeadError: see `weight` and `low_rank`.
        """
        return HeadValues(self.weight, self.bias, self.logit_scale, self.softcap, self.low_rank)


def head_of(model: nn.Module, *, check: bool = True) -> Head:
    """Find a model's head and make sure that it is all there is between hidden states and logits.

    Args:
        model: a causal language model of transformers, or peft's wrapper of one.
        check: compare the head's logits with the model's own on four tokens, which costs two
            forward passes, on all ranks of a model under tensor parallelism. Not possible for one
            that FSDP2 has sharded already.

    Returns:
        Head.

    Raises:
        TypeError: no transformers model.
        UnsupportedHeadError: the model's own logits differ from what the head gives, the head is
            quantised or adapted in a way that is not supported, or FSDP2 has sharded the model.
    """
    base = causal_lm(model)
    layer = base.get_output_embeddings()
    if layer is None:
        raise UnsupportedHeadError(f"{type(base).__name__} has no output embeddings")
    if check and (isinstance(base, FSDPModule) or isinstance(layer, FSDPModule)):
        raise UnsupportedHeadError(
            f"fully_shard was called on {type(base).__name__} or its head, so that its weights are "
            "gathered in its own forward only, where the loss is not; make a ModelWithLoss of the "
            "model first, then call fully_shard on its layers and last on the ModelWithLoss"
        )
    config = base.get_decoder().config
    embedding = base.get_input_embeddings()
    head = Head(
        layer,
        _logit_scale(config),
        getattr(config, "final_logit_softcapping", None),
        getattr(_without_adapter(embedding), "weight", None)
        is getattr(_without_adapter(layer), "weight", embedding),
    )
    if check:
        _check(base, head)
    return head


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside wrappers of torch.compile and peft, or the model itself.

    Raises:
        TypeError: not a model with a decoder and output embeddings.
        UnsupportedHeadError: peft's prompt learning, whose tokens only its own forward adds.
    """
    for name, adapter in getattr(model, "peft_config", {}).items():
        if getattr(adapter, "is_prompt_learning", False):
            raise UnsupportedHeadError(
                f"adapter {name!r} is a {type(adapter).__name__}: prompt learning lives outside of "
                "the model's weights, so the fused losses would not see it; use LoRA"
            )
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    unwrap = getattr(model, "get_base_model", None)
    base = unwrap() if callable(unwrap) else model
    for needed in ("get_decoder", "get_output_embeddings", "get_input_embeddings"):
        if not callable(getattr(base, needed, None)):
            raise TypeError(
                f"model: expected a causal language model of transformers or peft's wrapper of "
                f"one, got {type(base).__name__} without {needed}(); build a Head(layer, ...) "
                "yourself for other models"
            )
    return base


def last_hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """[batch, time, H] of a causal LM's decoder, after its final norm; no logits are made."""
    hidden: Tensor = causal_lm(model).get_decoder()(**inputs, use_cache=False).last_hidden_state
    return hidden


def _without_adapter(layer: nn.Module) -> nn.Module:
    """Return the layer that peft wrapped, or the layer itself."""
    saved = getattr(layer, "modules_to_save", None)
    if saved is not None:  # peft trains a copy of the whole layer
        if getattr(layer, "disable_adapters", False):
            return cast(nn.Module, layer.original_module)
        return cast(nn.Module, saved[cast(Any, layer).active_adapters[0]])
    inner = getattr(layer, "base_layer", None)
    if inner is None:
        return layer
    if not hasattr(layer, "lora_A"):
        raise UnsupportedHeadError(
            f"the head is wrapped in a {type(layer).__name__}; of peft's adapters only LoRA and "
            "modules_to_save are supported on it"
        )
    return cast(nn.Module, inner)


def _logit_scale(config: Any) -> float:
    """Return what a model multiplies its logits by, under the name that its family has for it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Falcon-H1
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)  # Granite divides, HyperCLOVA X multiplies
    if divisor is None:
        return 1.0
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)


def _check(base: Any, head: Head) -> None:
    """Raise UnsupportedHeadError where the model's own logits are not those of its head."""
    weight = head.weight
    # The forward of the class: accelerate replaces the model's own by one that casts to bfloat16.
    with torch.no_grad(), _evaluating(base), torch.autocast(weight.device.type, enabled=False):
        ids = torch.arange(1, 5, device=weight.device)[None] % weight.shape[0]
        expected = type(base).forward(base, input_ids=ids, use_cache=False).logits
        hidden = last_hidden_states(base, input_ids=ids)
        values = head.values
        if isinstance(weight, DTensor):
            values, expected = _of_this_rank(values, weight, expected)
        error = float((values.logits(hidden) - expected).abs().max() / expected.abs().max())
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    if not error <= tolerance:
        raise UnsupportedHeadError(
            f"{type(base).__name__} does not make its logits by lm_head, scale and soft cap alone: "
            f"they differ by {error:.1e} (relative), expected at most {tolerance:.0e}"
        )


def _of_this_rank(values: HeadValues, weight: DTensor, logits: Tensor) -> tuple[HeadValues, Tensor]:
    """This rank's rows of a head in shards, and their logits among those that the model made."""
    mesh = weight.device_mesh
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    if logits.shape[-1] == weight.shape[0]:
        logits = logits.chunk(mesh.size(), dim=-1)[mesh.get_local_rank()]
    bias = values.bias.to_local() if isinstance(values.bias, DTensor) else values.bias
    return replace(values, weight=weight.to_local(), bias=bias), logits


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off for a while; afterwards each module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
