"""Sections of what samples: rollouts of the student, and texts of other models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from selfdistill.config.section import (
    Float,
    InputFile,
    Int,
    JsonObject,
    NearbyName,
    OutputPath,
    PositiveInt,
    Section,
)

# Ranks that vLLM makes room for; an adapter may have any up to the last.
VLLM_ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


# Without a name and a password, which would be written wherever the address is.
ServerURL = Annotated[str, Field(pattern=r"^https?://[^/@]+(/|$)")]


class VLLMSettings(Section):
    """What a vLLM engine needs to know that runs in the trainer's own process, on its device."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The dtype of its weights and of its cache."""
    max_length: PositiveInt | None = None
    """Most tokens of a prompt and its completion, which must fit into the cache; by default what
    the model has positions for."""
    kv_cache_gib: Float = Field(default=4.0, gt=0)
    """Memory for keys and values, shared by all sequences that are sampled at once."""
    block_size: Int = Field(default=32, gt=0, multiple_of=32)
    """Tokens of a cache block, a multiple of 32 (smaller ones run on GPUs only): only whole blocks
    of a prompt are shared between its rollouts."""
    enforce_eager: bool = False
    """No compilation and no CUDA graphs: starts in seconds, samples more slowly on a GPU."""
    sleep: bool = False
    """Give the GPU's memory back while nothing is sampled (vLLM's sleep mode, for GPUs only): the
    cache is dropped, the weights wait in the machine's memory."""


class TextEngine(Section):
    """What all engines that answer prompts have in common."""

    model: str
    """What a server calls the model."""
    max_new_tokens: PositiveInt = 4096
    """Answers are cut off at this length, think part included."""
    cache: OutputPath | None = None
    """A folder that keeps the answers, so that nothing is asked twice; runs may share it."""


class LocalTextEngine(TextEngine):
    """What the engines of the trainer's own process have in common."""

    model: NearbyName
    """A folder, which counts from the YAML file, or a Hub name."""
    chat_template: InputFile | None = None
    """A file with the Jinja template to use instead of the tokenizer's own."""
    template: JsonObject = Field(default_factory=dict)
    """More variables for the chat template, such as {enable_thinking: true}."""


class TransformersTextEngine(LocalTextEngine):
    """A model in the trainer's process, read by transformers."""

    name: Literal["transformers"] = "transformers"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The dtype of its weights."""
    batch_size: PositiveInt = 16
    """Prompts answered at once."""


class VLLMTextEngine(VLLMSettings, LocalTextEngine):
    """A model in the trainer's process, read by vLLM."""

    name: Literal["vllm"] = "vllm"


class ServerTextEngine(TextEngine):
    """A model behind an OpenAI-compatible server."""

    name: Literal["server"] = "server"
    base_url: ServerURL
    """Up to and with /v1, such as http://localhost:8000/v1; a redirect is not followed."""
    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, if the server wants one."""
    timeout: Float = Field(default=600.0, gt=0)
    """Seconds without a byte from the server before a request counts as failed."""
    total_timeout: Float = Field(default=3600.0, gt=0)
    """Seconds that a request may take in all, whatever trickles in."""
    retries: Int = Field(default=5, ge=0)
    """How often a request is sent again when the server is busy, away or silent."""
    backoff: Float = Field(default=1.0, ge=0)
    """Seconds before the first retry; each further one waits twice as long, at most a minute."""
    concurrency: PositiveInt = 16
    """Requests under way at once."""
    extra_body: JsonObject = Field(default_factory=dict)
    """More fields of the request, such as {chat_template_kwargs: {enable_thinking: true}}, or for
    vLLM {skip_special_tokens: false}, where the tags of its answer are special tokens."""


TextEngineConfig = Annotated[
    TransformersTextEngine | VLLMTextEngine | ServerTextEngine, Field(discriminator="name")
]


class TransformersEngineConfig(Section):
    """Samples from the weights that are trained; with `shard` from a copy that follows them."""

    name: Literal["transformers"] = "transformers"
    batch_size: PositiveInt = 256
    """Rows sampled at once; a waiting group enters as soon as there are places for it. Bounds the
    memory of the key/value cache."""


class CheckedEngine(Section):
    """What engines with weights of their own have in common."""

    check_every: PositiveInt = 1
    """Compare the engine's log-probs with the trainer's own float32 ones every so many steps."""
    tolerance: Float | None = Field(default=None, gt=0)
    """Largest difference that is allowed, in nats; by default 1e-4 in float32, 1 in bfloat16."""


class VLLMEngineConfig(CheckedEngine, VLLMSettings):
    """vLLM with weights of its own, which follow the student's after every step; on every rank."""

    name: Literal["vllm"] = "vllm"
    tensor_parallel_size: PositiveInt = 1
    """So many ranks of torchrun, one after the other, share an engine: each holds a part of its
    weights, and a cache of `kv_cache_gib` for its part of the heads. One process alone (evaluate,
    analyze) has an engine of its own."""


class VLLMServerEngineConfig(CheckedEngine):
    """Servers of vLLM on this or other machines, which are handed the student's LoRA adapter."""

    name: Literal["vllm_server"] = "vllm_server"
    base_urls: Annotated[tuple[ServerURL, ...], Field(min_length=1)]
    """Each up to and with /v1, such as http://localhost:8000/v1; they share the prompts, and a
    redirect is not followed."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the servers were started with: how close their log-probs can be."""
    max_staleness: Annotated[Int, Field(ge=0, le=1)] = 0
    """1: the rollouts of a step are drawn while the one before trains, so by weights that are one
    step older. The loss has to weigh them: GRPO does, others with `importance_clip`."""
    adapters: OutputPath | None = None
    """A folder for adapters that all servers read under the same path; by default a temporary one,
    which only servers on this machine read."""
    api_key_variable: str = "VLLM_API_KEY"
    """The environment variable that holds the key, if the servers want one."""
    timeout: Float = Field(default=600.0, gt=0)
    """Seconds without an answer before a server counts as away; others then take its prompts."""
    patience: Float = Field(default=60.0, ge=0)
    """Seconds to wait for a server to come back when all are away; then the run ends."""
    concurrency: PositiveInt = 64
    """Rollouts under way at once on each server, from each rank."""


EngineConfig = Annotated[
    TransformersEngineConfig | VLLMEngineConfig | VLLMServerEngineConfig,
    Field(discriminator="name"),
]

# Of each engine, what a run that goes on may have otherwise: where servers are and how they are
# asked, and how many ranks share an engine. What is sampled does not depend on it.
PLACES_OF_ENGINES = {
    "vllm": ("tensor_parallel_size",),
    "vllm_server": (
        *("base_urls", "adapters", "api_key_variable"),
        *("timeout", "patience", "concurrency"),
    ),
}
