"""Tiny random language models for tests of integrations, and gradients by name."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = ("qwen3", "llama", "gemma3")


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Return the configuration of a model of that family with a vocabulary of 300."""
    sizes = {**SIZES, **overrides}
    match family:
        case "qwen3":  # tied, as Qwen3 below 4B
            return Qwen3Config(**{"tie_word_embeddings": True, "head_dim": 8, **sizes})
        case "llama":
            return LlamaConfig(**{"tie_word_embeddings": False, **sizes})
        case "gemma3":  # with Gemma 2's cap on the logits
            return Gemma3TextConfig(
                **{
                    "head_dim": 8, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8,
                    "sliding_window": 8, **sizes,
                }
            )  # fmt: skip
        case "cohere":
            return CohereConfig(**{"logit_scale": 0.25, **sizes})
        case "granite":
            return GraniteConfig(**{"logits_scaling": 4.0, **sizes})
    raise ValueError(f"unknown family {family!r}")


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a random model whose logits differ from token to token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.2)
    return model.train()


def with_lora(model: nn.Module, **options: object) -> nn.Module:
    """Wrap the model with LoRA on its head, and give B values other than zero."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head", "q_proj"], **options}
    wrapped = get_peft_model(model, LoraConfig(**config))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def neighbour(model: nn.Module, seed: int = 5, size: float = 0.05) -> nn.Module:
    """Return a frozen copy with somewhat other weights: a teacher."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return other.requires_grad_(False).eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a model by name, and forget them."""
    found = {
        name: parameter.grad for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }  # fmt: skip
    for parameter in model.parameters():
        parameter.grad = None
    return found


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float = 1e-5) -> None:
    """Compare tensors by name, each relative to the largest value of all."""
    assert ours.keys() == theirs.keys()
    scale = max(float(value.abs().max()) for value in theirs.values())
    assert scale > 0
    for name, value in theirs.items():
        error = float((ours[name] - value).abs().max()) / scale
        assert error <= limit, f"{name}: relative error {error:.1e}, allowed {limit:.0e}"
