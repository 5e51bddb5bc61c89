"""Sampling by servers of vLLM, on this or other machines, with an adapter that follows the student.

Prompts go out and completions come back as token ids; a server may decode them for itself, nobody
reads its text. After every change of the weights `sync` writes the LoRA adapter into a folder and
has each server load it under a new name, by vLLM's interface for adapters at run time: a server's
cached keys and values belong to a name, so no old ones are met. The ranks of a run share the
servers; rank 0 hands the adapter over.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from selfdistill.config import VLLMServerEngineConfig
from selfdistill.model.folder import load_config, load_generation_config
from selfdistill.rollout.engine import (
    EngineError,
    Rollout,
    SamplingParams,
    check_request,
    end_token_ids,
    make_rollout,
)
from selfdistill.rollout.vllm_requests import refuse_no_numbers, rollout_seeds
from selfdistill.rollout.vllm_servers import Adapter, Servers

_NO_NUMBER = -9999.0  # what vLLM writes for a log-prob that is -inf or less than it can say


class Drawing:
    """Rollouts that are being drawn while the caller does something else.

    Requests travel in a thread of their own; tokens become rollouts where `finish` is called,
    because a tokenizer is not for two threads.
    """

    def __init__(
        self,
        engine: VLLMServerEngine,
        requests: Sequence[Mapping[str, Any]],
        *,
        group_size: int,
        params: SamplingParams,
    ) -> None:
        self._engine = engine
        self._group_size = group_size
        self._params = params
        self._choices: list[Any] = []
        self._error: Exception | None = None

        def draw() -> None:
            homes = [place // group_size for place in range(len(requests))]
            try:
                self._choices = engine.servers.complete(requests, homes)
            except Exception as error:  # raised where somebody waits for the rollouts
                self._error = error

        self._thread = threading.Thread(target=draw, daemon=True)
        self._thread.start()

    def finish(self) -> list[list[Rollout]]:
        """Wait for the rollouts; see `VLLMServerEngine.generate`."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        rollouts = [self._engine.read(choice, self._params) for choice in self._choices]
        size = self._group_size
        refuse_no_numbers(rollouts, group_size=size)
        return [rollouts[i : i + size] for i in range(0, len(rollouts), size)]


class VLLMServerEngine:
    """Samples with servers of vLLM (implements `selfdistill.rollout.engine.RolloutEngine`).

    Args:
        source: the model's folder or Hub name, as the servers have it.
        tokenizer: decodes the completions and knows the end-of-sequence token.
        settings: where the servers are, and how they are asked.

    Raises:
        EngineError: the HTTP client is not installed, or the key cannot be sent.
        UnusableModelError: the model's configuration cannot be used.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: VLLMServerEngineConfig,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.servers = Servers(settings)
        config = load_config(source)
        self._positions = getattr(config, "max_position_embeddings", None)
        self._vocabulary: int | None = getattr(config, "vocab_size", None)
        self.eos_token_ids = end_token_ids(load_generation_config(source, config), tokenizer)
        self._adapter: Adapter | None = None
        self._removal: weakref.finalize[..., VLLMServerEngine] | None = None
        self._syncs = 0

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        """Sample `group_size` completions for each prompt (token ids).

        Returns:
            One list of rollouts per prompt, in order.

        Raises:
            ValueError: see `check_request`.
            EngineError: a server refused a request, or all of them are away.
            NotANumberError: the model has no probabilities for a token.
        """
        return self.begin(prompts, group_size=group_size, params=params).finish()

    def wait_for_group(self) -> None:
        """Nothing to do: each request is answered by itself."""

    def begin(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> Drawing:
        """Start to sample, see `generate`; the weights must not be synced before it has ended."""
        lengths = [n for n in (self._positions, self.servers.max_length) if n is not None]
        check_request(
            prompts, group_size=group_size, params=params, max_length=min(lengths, default=None)
        )
        seeds = rollout_seeds(len(prompts), group_size=group_size, seed=params.seed)
        requests = [
            self._request(prompts[place // group_size], params, seed)
            for place, seed in enumerate(seeds)
        ]
        return Drawing(self, requests, group_size=group_size, params=params)

    def sync(self, model: nn.Module) -> None:
        """Sample from the LoRA adapter that `model` has now; all ranks call it together.

        Args:
            model: a PEFT wrapper of the model that the servers have.

        Raises:
            ValueError: the model has no adapter.
            EngineError: the adapter cannot be written, a server refused it, or all are away.
        """
        if not hasattr(model, "peft_config"):
            raise ValueError(
                f"model is a {type(model).__name__} without a PEFT adapter: servers of vLLM are "
                "handed adapters only"
            )
        self._syncs += 1
        previous = self._removal
        is_first = not _has_ranks() or dist.get_rank() == 0
        if is_first:
            if previous is None:  # the last adapter leaves the servers when the engine ends
                weakref.finalize(self, self.servers.leave)
            name = f"selfdistill-{self._run}-{self._syncs}"
            self._adapter = Adapter(name, self._write(model, name))
            # The last folder goes when the engine does.
            self._removal = weakref.finalize(
                self, shutil.rmtree, self._adapter.folder, ignore_errors=True
            )
            self.servers.adopt(self._adapter, loads=True)
        if _has_ranks():  # the others hear of it when the servers have it
            told: list[Any] = [self._adapter]
            dist.broadcast_object_list(told, src=0)
            self._adapter = told[0]
        if not is_first:
            self.servers.adopt(told[0], loads=False)
        elif previous is not None:
            previous()

    @cached_property
    def _run(self) -> str:
        # Servers outlive runs, and know an adapter by its name.
        return secrets.token_hex(4)

    @cached_property
    def _temporary(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="selfdistill-adapters-")

    def _write(self, model: Any, name: str) -> str:
        folder = Path(self.settings.adapters or self._temporary.name, name)
        try:
            folder.mkdir(parents=True)
            model.save_pretrained(folder, save_embedding_layers=False)
        except OSError as error:
            raise EngineError(
                f"cannot write the adapter for the servers to {folder}: {error}. Make room, or set "
                "rollout.engine.adapters to a folder that this process writes and all servers read"
            ) from error
        return str(folder)

    def _request(self, prompt: Sequence[int], params: SamplingParams, seed: int) -> dict[str, Any]:
        # All that a generation config of the model's could set otherwise is said.
        return {
            "prompt": list(prompt),
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed,
            "stop_token_ids": list(self.eos_token_ids),
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
        }

    def read(self, choice: Any, params: SamplingParams) -> Rollout:
        """Return the rollout in a server's answer.

        Raises:
            EngineError: it holds no token ids, or not their log-probs, or others than were asked.
        """
        most = params.max_new_tokens
        try:
            ids = [int(token) for token in choice["token_ids"]]
            logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            complete = len(ids) == len(logprobs) > 0
            known = self._vocabulary is None or max(ids, default=0) < self._vocabulary
        except (LookupError, TypeError, ValueError):
            complete = known = False
        if complete and not (known and len(ids) <= most):
            raise EngineError(
                f"a server of rollout.engine.base_urls answered with {len(ids)} tokens up to "
                f"{max(ids)}, asked for {most} at most of a vocabulary of {self._vocabulary}: is "
                "it a server of this model?"
            )
        if not complete:
            raise EngineError(
                "a server of rollout.engine.base_urls answered without token ids and their "
                f"log-probs: {str(choice)[:200]}. It has to be vLLM, 0.10.2 or later"
            )
        logprobs = [float("-inf") if value <= _NO_NUMBER else value for value in logprobs]
        return make_rollout(ids, logprobs, self.tokenizer, self.eos_token_ids, stop=params.stop)


def _has_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
