"""What `export` writes, in the real vLLM: loaded as a user does, and compared with torch."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_runs import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from selfdistill.export import export
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.training.loop import train

# `make test-vllm` is for these tests: there a vLLM that cannot be imported fails them.
if os.environ.get("SELFDISTILL_REQUIRE_VLLM") != "1":
    pytest.importorskip(
        "vllm",
        reason="needs vllm: make test-vllm; with a GPU also pip install vllm",
    )

QUESTIONS = ["47 + 8 + 5 mod 100", "12 + 3 mod 100", "90 - 4 + 7 mod 100"]
TOKENS = 12
# As in test_vllm_engine.py: two ways to compute in float32 two layers and a head.
NATS = 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, and what a run that trained an adapter on it was exported to."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data *= 10  # so that the likeliest token is far from the next one
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    train(
        tiny_config(
            folder / "base",
            folder / "run",
            adapter={"r": 8, "alpha": 64},
            steps=3,
            optimizer={"learning_rate": 1e-2, "warmup_steps": 0},
            report=False,
        )
    )
    export(folder / "run", folder / "merged", checkpoint="last")
    export(folder / "run", folder / "adapter", checkpoint="last", form="adapter")
    return folder


def by_torch(model: Any, tokenizer: Any) -> list[tuple[list[int], torch.Tensor]]:
    """The likeliest tokens of each answer, and their log-probs."""
    found = []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)[0]
            start = prompt["input_ids"].shape[1]
            scores = model(ids[None]).logits[0, start - 1 : -1].log_softmax(-1)
        answer = ids[start:]
        found.append((answer.tolist(), scores.gather(-1, answer[:, None])[:, 0]))
    return found


def by_vllm(model: Path, adapter: Path | None = None) -> list[tuple[list[int], torch.Tensor]]:
    """The same by vLLM's own door, which reads the tokenizer and its template from the folder."""
    import vllm
    from vllm.lora.request import LoRARequest

    settings: dict[str, Any] = {} if adapter is None else {"enable_lora": True, "max_lora_rank": 8}
    llm = vllm.LLM(
        str(model),
        dtype="float32",
        max_model_len=256,
        kv_cache_memory_bytes=2**26,
        block_size=32,
        enforce_eager=True,
        **settings,
    )
    outputs = llm.chat(
        [[{"role": "user", "content": question}] for question in QUESTIONS],
        vllm.SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0),
        use_tqdm=False,
        lora_request=None if adapter is None else LoRARequest("trained", 1, str(adapter)),
    )
    found = []
    for output in outputs:
        (answer,) = output.outputs
        ids = list(answer.token_ids)
        scores = [place[token].logprob for token, place in zip(ids, answer.logprobs, strict=True)]
        found.append((ids, torch.tensor(scores)))
    del llm
    gc.collect()
    return found


def assert_same(
    expected: list[tuple[list[int], torch.Tensor]], got: list[tuple[list[int], torch.Tensor]]
) -> None:
    for (ids, scores), (other_ids, other_scores) in zip(expected, got, strict=True):
        assert other_ids == ids
        assert (other_scores - scores).abs().max() < NATS


def test_a_merged_model_answers_in_vllm_as_in_transformers(exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported / "merged")
    expected = by_torch(model, AutoTokenizer.from_pretrained(exported / "merged"))
    assert_same(expected, by_vllm(exported / "merged"))


def test_an_adapter_answers_in_vllm_as_in_peft(exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported / "adapter")
    base = AutoModelForCausalLM.from_pretrained(exported / "base")
    untrained = by_torch(base, tokenizer)
    expected = by_torch(peft.PeftModel.from_pretrained(base, exported / "adapter"), tokenizer)
    # The adapter has a say, or nothing would be shown.
    assert (
        max(
            (scores[0] - own[0]).abs()
            for (_, scores), (_, own) in zip(expected, untrained, strict=True)
        )
        > 100 * NATS
    )
    assert_same(expected, by_vllm(exported / "base", exported / "adapter"))
