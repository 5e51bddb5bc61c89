"""Tiny random models, the arithmetic tokenizer, and ragged prompt groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_solvers import tiny_llama, write_solver
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3MoeConfig,
)

from selfdistill.model.layout import PromptGroup
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer

_COMMON = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _config(family: str) -> PreTrainedConfig:
    match family:
        case "qwen3":
            return Qwen3Config(**_COMMON, tie_word_embeddings=True)
        case "llama":
            return LlamaConfig(**_COMMON, tie_word_embeddings=False)
        case "mistral":
            return MistralConfig(**_COMMON, sliding_window=5)
        case "qwen3_moe":
            return Qwen3MoeConfig(
                **_COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
            )
        case "gpt_neox":
            return GPTNeoXConfig(**{k: v for k, v in _COMMON.items() if k != "head_dim"})
        case "gemma3":
            layers = ["sliding_attention", "full_attention", "sliding_attention"]
            return Gemma3TextConfig(
                **_COMMON, sliding_window=5, layer_types=layers, query_pre_attn_scalar=16
            )
    raise ValueError(f"family is {family!r}")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the arithmetic task's tokenizer."""
    return build_tokenizer()


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerBase) -> Callable[..., LlamaForCausalLM]:
    """Return a factory of tiny random Llama models over the arithmetic vocabulary."""

    def make(*, seed: int = 0) -> LlamaForCausalLM:
        return tiny_llama(tokenizer, seed=seed)

    return make


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Return a factory of tiny random causal LMs whose attention matters."""

    def make(family: str, seed: int = 0, **overrides: object) -> PreTrainedModel:
        config = _config(family)
        for name, value in overrides.items():
            setattr(config, name, value)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # The usual 0.02 would make attention nearly uniform and hide errors.
                if parameter.dim() == 2:
                    parameter.normal_(0.0, 0.2)
        return model.train()

    return make


@pytest.fixture
def ragged_groups() -> list[PromptGroup]:
    """Return two prompts with ragged contexts and completions, one of a single token."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, 61, (length,), generator=generator).tolist()

    groups = []
    for question, contexts, lengths in [(9, [6, 11, 3], [7, 1, 12]), (4, [5, 5], [3, 10])]:
        head, tail = tokens(question), tokens(2)
        groups.append(
            PromptGroup(
                student_prompt=head + tail,
                teacher_prompts=[[*head, 3, *tokens(length), *tail] for length in contexts],
                completions=[tokens(length) for length in lengths],
            )
        )
    return groups


@pytest.fixture
def sharp_solver_dir(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    make_model: Callable[..., LlamaForCausalLM],
) -> Path:
    """Return a folder like the shipped solver's, with random weights that make the context matter.

    Between solver_dir's two distributions there is hardly a difference, so that what training makes
    of it has few digits.
    """
    model = make_model()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 10
    folder = tmp_path / "solver"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def solver_dir(tmp_path: Path) -> Path:
    """Return a folder like the shipped solver's, with random weights."""
    return write_solver(tmp_path / "solver")
