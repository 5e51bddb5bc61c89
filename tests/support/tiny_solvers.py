"""A solver like the shipped one, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer


def tiny_llama(
    tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, positions: int = 256
) -> LlamaForCausalLM:
    """Return a tiny random Llama over a tokenizer's vocabulary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def write_solver(folder: Path, *, seed: int = 0) -> Path:
    """Write model and arithmetic tokenizer into a folder and return it."""
    tokenizer = build_tokenizer()
    tiny_llama(tokenizer, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
