"""Sampling by vLLM in the trainer's process, with weights that follow the student's.

Prompts go in and completions come out as token ids; vLLM never sees a tokenizer. After every change
of the weights `sync` hands them over: all of them, or a LoRA adapter under a new id. Cached keys
and values of the old weights are dropped each time.

Every rank of a run has an engine of its own, on its own device, or shares one with the ranks of a
group (`tensor_parallel_size`): vLLM is told that somebody else has launched the processes
("external_launcher"), and uses those that are there. A rank with an engine of its own waits for no
other one while it samples; those of a group sample together (`selfdistill.rollout.vllm_groups`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from selfdistill.config import VLLM_ADAPTER_RANKS, VLLMSettings
from selfdistill.model.folder import load_config, load_generation_config
from selfdistill.rollout.engine import (
    EngineError,
    Rollout,
    SamplingParams,
    check_request,
    end_token_ids,
    make_rollout,
)
from selfdistill.rollout.vllm_groups import EngineGroup
from selfdistill.rollout.vllm_requests import refuse_no_numbers, rollout_seeds

# The token ids of a prompt, and how a completion of it is drawn, in vLLM's words.
_Request = tuple[list[int], dict[str, Any]]


class WeightSync:
    """A part of vLLM's worker, which holds the engine's model."""

    def load_student_weights(
        self, weights: Sequence[tuple[str, torch.Tensor]], head_is_embedding: bool
    ) -> None:
        """Take over a whole model's weights, named as in its checkpoint, a tied head left out."""
        from vllm.model_executor.layers.vocab_parallel_embedding import (
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        worker: Any = self  # vLLM mixes this class into its worker's
        worker.reload_weights(weights_iterator=iter(weights))
        if not head_is_embedding:  # whatever the config says: the file may say otherwise
            return
        model = worker.model_runner.get_model()
        # Reloading leaves a tied head with its old weight, on a CPU with a packed copy of it, and
        # raises nothing: log-probs are then off by whole nats.
        layers = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
        (embedding,) = [layer for layer in layers if not isinstance(layer, ParallelLMHead)]
        (head,) = [layer for layer in layers if isinstance(layer, ParallelLMHead)]
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)


class VLLMEngine:
    """Samples with vLLM (implements `selfdistill.rollout.engine.RolloutEngine`).

    The engine starts at its first use; where several ranks have one each, at once, because they
    start together.

    Args:
        source: the model's folder or Hub name, the weights to begin with.
        tokenizer: decodes the completions and knows the end-of-sequence token.
        settings: memory, lengths and precision.
        adapter_rank: r of the LoRA adapters that `sync` will bring; None: it brings all weights.
        tensor_parallel_size: ranks that share an engine, see `vllm_groups.check_groups`; a process
            without others has one of its own whatever it says.

    Raises:
        EngineError: vLLM has no room for such an adapter, or one of several ranks does not start.
        UnusableModelError: the model's configuration cannot be used.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: VLLMSettings,
        *,
        adapter_rank: int | None = None,
        tensor_parallel_size: int = 1,
    ) -> None:
        if adapter_rank is not None and adapter_rank > VLLM_ADAPTER_RANKS[-1]:
            raise EngineError(
                f"an adapter of rank {adapter_rank} is more than vLLM's {VLLM_ADAPTER_RANKS[-1]}"
            )
        self.source = source
        self.tokenizer = tokenizer
        self.settings = settings
        self.adapter_rank = adapter_rank
        config = load_config(source)
        self.max_length = settings.max_length or getattr(config, "max_position_embeddings", None)
        self.eos_token_ids = end_token_ids(load_generation_config(source, config), tokenizer)
        self._adapter: Any = None
        self._adapter_folder: tempfile.TemporaryDirectory[str] | None = None
        self._syncs = 0
        self._asleep = False
        ranks = torch.distributed
        self._is_one_of_several = ranks.is_initialized() and ranks.get_world_size() > 1
        self._ranks_per_engine = tensor_parallel_size if self._is_one_of_several else 1
        self._group = None
        if self._ranks_per_engine > 1:
            self._group = EngineGroup(self._ranks_per_engine)
        if self._is_one_of_several:
            _ = self._llm

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        """Sample `group_size` completions for each prompt (token ids).

        Returns:
            One list of rollouts per prompt, in order.

        Raises:
            ValueError: see `check_request`.
            EngineError: vLLM failed.
            NotANumberError: the model has no probabilities for a token.
        """
        check_request(prompts, group_size=group_size, params=params, max_length=self.max_length)
        requests = [
            (
                list(prompts[place // group_size]),
                {
                    "temperature": params.temperature,
                    "top_k": params.top_k,
                    "top_p": params.top_p,
                    "min_p": params.min_p,
                    "max_tokens": params.max_new_tokens,
                    "seed": seed,
                    "logprobs": 0,  # of the sampled token alone
                    "stop_token_ids": list(self.eos_token_ids),
                    "detokenize": False,
                },
            )
            for place, seed in enumerate(
                rollout_seeds(len(prompts), group_size=group_size, seed=params.seed)
            )
        ]
        with self._guarded("sampling"):
            outputs, own = self._draw(requests)
            rollouts = [self._rollout(output.outputs[0], params.stop) for output in outputs[own]]
        refuse_no_numbers(rollouts, group_size=group_size)
        return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]

    def wait_for_group(self) -> None:
        """Sample for the other ranks of the group until none of them asks any more.

        Raises:
            EngineError: vLLM failed, or another rank.
        """
        if self._group is None:
            return
        with self._guarded("sampling for other ranks"):
            while self._draw(None)[0]:
                pass

    def _draw(self, own: Sequence[_Request] | None) -> tuple[list[Any], slice]:
        """Return what vLLM draws in a call, and which of it was asked for by this rank.

        Args:
            own: what this rank asks; None: nothing more, it takes part for the others of its group.
        """
        asked, place = list(own or ()), slice(None)
        if self._group is not None:
            asked, place = self._group.exchange(own)
        if not asked:
            return [], place
        llm = self._llm
        import vllm

        self._wake()
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in asked],
            [vllm.SamplingParams(**sampling) for _, sampling in asked],
            use_tqdm=False,
            lora_request=self._adapter,
        )
        if self.settings.sleep:
            llm.sleep(level=1)
            self._asleep = True
        return outputs, place

    def sync(self, model: nn.Module) -> None:
        """Sample from the weights that `model` has now, or from its LoRA adapter.

        Args:
            model: a transformers causal LM of the same architecture as `source`, or a PEFT wrapper
                of `source` itself.

        Raises:
            ValueError: a PEFT model for an engine without `adapter_rank`, or the other way round.
            EngineError: vLLM failed or refused the weights.
        """
        has_adapter = hasattr(model, "peft_config")
        if has_adapter != (self.adapter_rank is not None):
            raise ValueError(
                f"model {'has' if has_adapter else 'lacks'} a PEFT adapter, but the engine was "
                f"built with adapter_rank={self.adapter_rank}: give it the adapter's r, or None "
                "for a model that is trained whole"
            )
        llm = self._llm
        self._syncs += 1
        with self._guarded("taking over the student's weights"):
            self._wake()
            if has_adapter:
                self._take_adapter(model)
            else:
                # As in a checkpoint: a tied head is the embedding and not sent again.
                weights: dict[int, tuple[str, torch.Tensor]] = {}
                for name, tensor in model.state_dict().items():
                    weights.setdefault(tensor.data_ptr(), (name, tensor.detach()))
                student: Any = model
                head = student.get_output_embeddings().weight
                tied = head is student.get_input_embeddings().weight
                llm.collective_rpc("load_student_weights", args=(list(weights.values()), tied))
            if not llm.reset_prefix_cache():
                raise RuntimeError("the prefix cache could not be emptied")

    def _take_adapter(self, model: Any) -> None:
        """Load the adapter under a new id; vLLM keeps what it has loaded under an old one."""
        from vllm.lora.request import LoRARequest

        folder = tempfile.TemporaryDirectory(prefix="selfdistill-adapter-")
        model.save_pretrained(folder.name, save_embedding_layers=False)
        adapter = LoRARequest(f"step-{self._syncs}", self._syncs, folder.name)
        engine = self._llm.llm_engine
        if self._adapter is not None:
            engine.remove_lora(self._adapter.lora_int_id)
        engine.add_lora(adapter)
        # vLLM may read it again while it is in use.
        self._adapter, self._adapter_folder = adapter, folder

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    @cached_property
    def _llm(self) -> Any:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are handed over in memory
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import vllm
        except ImportError as error:
            raise EngineError(
                f"the vLLM engine needs vllm ({error}): pip install vllm; on a machine without a "
                "GPU, in an environment of its own, what requirements-vllm.txt says"
            ) from error
        settings = self.settings
        adapter: dict[str, Any] = {}
        if self.adapter_rank is not None:
            rank = min(r for r in VLLM_ADAPTER_RANKS if r >= self.adapter_rank)
            adapter = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
        launcher: dict[str, Any] = {}
        if self._is_one_of_several:
            # What torchrun sets, and whoever has made the group in another way may not have set.
            os.environ.setdefault("RANK", str(torch.distributed.get_rank()))
            os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
            launcher = {
                "distributed_executor_backend": "external_launcher",
                "tensor_parallel_size": self._ranks_per_engine,
            }
        with self._guarded("starting"):
            llm = vllm.LLM(
                self.source,
                skip_tokenizer_init=True,
                trust_remote_code=False,
                dtype=settings.dtype,
                max_model_len=self.max_length,
                kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30),
                block_size=settings.block_size,
                enable_prefix_caching=True,
                enforce_eager=settings.enforce_eager,
                generation_config="vllm",  # nothing is sampled otherwise than asked for
                logprobs_mode="processed_logprobs",  # of what is sampled from
                worker_extension_cls=f"{WeightSync.__module__}.{WeightSync.__qualname__}",
                enable_sleep_mode=settings.sleep,
                **adapter,
                **launcher,
            )
        if self._is_one_of_several:
            # At the end of the process vLLM would take down the ranks' group, which is not its own
            # and is gone by then.
            finalizer = getattr(llm.llm_engine.engine_core, "_finalizer", None)
            if finalizer is not None:
                finalizer.detach()
        return llm

    @contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        """Say what failed, and keep vLLM away from the trainer's random numbers."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        except Exception as error:
            raise EngineError(
                f"the vLLM engine ({self.source}) failed while {doing}: "
                f"{type(error).__name__}: {error}. The checkpoints written so far are intact: go "
                "on from the last one with --resume"
            ) from error

    def _rollout(self, output: Any, stop: Sequence[str] = ()) -> Rollout:
        ids = list(output.token_ids)
        logprobs = [
            scores[token].logprob for token, scores in zip(ids, output.logprobs, strict=True)
        ]
        # vLLM sees no text, so what it wrote behind a stop string is cut off here.
        return make_rollout(ids, logprobs, self.tokenizer, self.eos_token_ids, stop=stop)
