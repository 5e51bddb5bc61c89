r"""What a run will need: memory by term, and the share of the time that each phase takes.

Estimates from the shape of the model and the number of tokens; nothing is measured.

*Memory*, in bytes. P parameters, A of them trained (all, or the adapters'), e bytes an element of
the compute dtype, T packed tokens of one forward and backward pass of the student, H hidden size,
I intermediate size, h and k attention heads and key/value heads of size d, L layers:

    weights             e P  (adapters included)
    master weights      4 A  where the compute dtype is not float32, else the weights themselves
    gradients           4 A
    optimizer (AdamW)   8 A
    teacher             base: e P for the frozen copy, 0 with adapters (they are switched off);
                        ema, refreshed: 4 A, and e A where the compute dtype is not float32; live: 0
    activations         e L T (6 H + 2 (h + k) d + 4 I): what a gated decoder layer keeps for its
                        backward pass; with activation checkpointing e T (L H + one layer's)
    rollout cache       transformers: 2 e L k d (prompt + completion) for each row sampled at once;
                        another engine: what it is configured to take
    loss workspace      selfdistill_kernels' own plan for the completion tokens of a pass (that of
                        the CPU; on a GPU slabs of gradients take its place)
    hidden states       3 e T' H for the T' completion tokens: student, its gradient, teacher

Allocator slack and the libraries' own buffers are left out: plan for a fifth more.

*Time*, in FLOPs. M matrix parameters of the decoder (no embedding, no head), V vocabulary, N
completion tokens, c keys that a token attends on average:

    forward, a token    2 M + 4 L h d c
    rollout             that for every prompt token once and every completion token, and 2 H V for
                        the logits of each completion token
    student forward     the packed tokens;  backward: twice that, once with adapters (the frozen
                        weights need no gradient), and once more with activation checkpointing
    teacher forward     its packed tokens, less the prompts that a live teacher borrows
    loss                2 N H V for each GEMM of the plan

A share is FLOPs divided by the rate at which a phase computes, relative to a forward pass: 1, but
for the rollout ROLLOUT_RATE, because sampling reads all weights for one token of each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from selfdistill.config import AdapterConfig
from selfdistill.model.adapters import attach_adapter
from selfdistill_kernels.backends.native.plan import TilePlan

# Sampling against reading, tokens a second: 70 against 500 with SmolLM2-135M at batch 8 on a CPU.
# Larger batches, and engines made for sampling, do better.
ROLLOUT_RATE = 0.15


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a causal language model.

    Attributes:
        parameters: all, tied ones once.
        matrix_parameters: those of the decoder that every token is multiplied with. (Of a mixture
            of experts all count, so its time is overestimated.)
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary: as in its config.
        trained: parameters that learn.
        adapters: of them, those of adapters.
    """

    parameters: int
    matrix_parameters: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    trained: int
    adapters: int = 0

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        *,
        rank: int | None = None,
        target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear",
    ) -> ModelShape:
        """Measure a model without its weights.

        Args:
            config: the model's.
            rank: of LoRA adapters on `target_modules`; None: every weight learns.
            target_modules: names of linear layers; "all-linear" is every one but the head.

        Raises:
            UnsupportedAdapterError: there are no such layers.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        text = model.get_decoder().config
        heads = text.num_attention_heads
        head = model.get_output_embeddings()
        parameters = sum(p.numel() for p in model.parameters())
        outside = {id(p): p for p in (head.weight, model.get_input_embeddings().weight)}
        adapters = 0
        if rank is not None:
            wanted = AdapterConfig(r=rank, target_modules=target_modules)
            with torch.device("meta"):
                adapted = attach_adapter(model, wanted, seed=0)
            adapters = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        return cls(
            parameters=parameters,
            matrix_parameters=parameters - sum(p.numel() for p in outside.values()),
            hidden=text.hidden_size,
            # GPT-NeoX and the like name it, GPT-2 does not.
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            layers=text.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocabulary=head.weight.shape[0],
            trained=parameters if rank is None else adapters,
            adapters=adapters,
        )


@dataclass(frozen=True)
class StepShape:
    """The tokens of one training step.

    Attributes:
        prompts, group_size: of the step.
        prompt: tokens of a student prompt, on average.
        context: tokens that the teacher's prompt has more.
        completion: tokens of a rollout, at most.
        tokens_per_pass: packed student tokens of one forward and backward pass.
        rollout_rows: rows that a transformers engine samples at once.
        engine_bytes: what another engine takes for its cache; None: it is transformers.
        critiques: how many times the teacher reads a rollout, each time after another context.
    """

    prompts: int
    group_size: int
    prompt: int
    context: int
    completion: int
    tokens_per_pass: int
    rollout_rows: int
    engine_bytes: int | None = None
    critiques: int = 1

    @property
    def rollouts(self) -> int:
        """Rollouts of the step."""
        return self.prompts * self.group_size

    @property
    def completion_tokens(self) -> int:
        """N: completion tokens of the step."""
        return self.rollouts * self.completion

    @property
    def student_tokens(self) -> int:
        """Packed: each prompt once, then its rollouts."""
        return self.prompts * self.prompt + self.completion_tokens

    def teacher_tokens(self, *, borrows: bool) -> int:
        """Packed: contexts and rollouts, and each prompt once unless it is borrowed."""
        own = 0 if borrows else self.prompts * self.prompt
        return own + self.critiques * (self.rollouts * self.context + self.completion_tokens)


@dataclass(frozen=True)
class Weights:
    """How the weights are held.

    Attributes:
        itemsize: e, bytes of an element of the compute dtype.
        teacher: whose weights teach; None: nobody's.
        checkpointing: activations are recomputed.
    """

    itemsize: int = 4
    teacher: Literal["base", "live", "ema", "refreshed"] | None = "base"
    checkpointing: bool = False


def plan_memory(model: ModelShape, step: StepShape, weights: Weights) -> dict[str, int]:
    """Return the bytes of each term; the module says how they are found."""
    e, trained = weights.itemsize, model.trained
    half = e < 4
    tokens = min(step.tokens_per_pass, step.student_tokens)
    layer = (
        e
        * tokens
        * (
            6 * model.hidden
            + 2 * (model.heads + model.kv_heads) * model.head_dim
            + 4 * model.intermediate
        )
    )
    kept = e * tokens * model.layers * model.hidden + layer
    teachers = {
        "base": 0 if model.adapters else e * model.parameters,
        "ema": (4 + e * half) * trained,
        "refreshed": (4 + e * half) * trained,
        "live": 0,
    }
    cache = 2 * e * model.layers * model.kv_heads * model.head_dim
    cache *= (step.prompt + step.completion) * min(step.rollout_rows, step.rollouts)
    completions = min(tokens, step.completion_tokens)
    return {
        "weights": e * (model.parameters + model.adapters),
        "master weights": 4 * trained if half else 0,
        "gradients": 4 * trained,
        "optimizer (AdamW)": 8 * trained,
        **({f"teacher ({weights.teacher})": teachers[weights.teacher]} if weights.teacher else {}),
        "activations": kept if weights.checkpointing else layer * model.layers,
        "rollout cache": cache if step.engine_bytes is None else step.engine_bytes,
        "loss workspace": loss_plan(model, step, weights).bytes,
        "hidden states": 3 * e * completions * model.hidden,
    }


def sharded_memory(model: ModelShape, weights: Weights) -> tuple[int, int]:
    """Return the bytes that FSDP2 divides by the number of ranks, and those that each adds.

    Divided are the float32 weights that are trained (no rounded ones beside them), frozen weights,
    gradients, moments, and the teacher; one that follows adapters has frozen weights of its own.
    Each rank adds a whole copy of the model, which samples.
    """
    e = weights.itemsize
    frozen = e * model.parameters if model.adapters else 0
    teachers = {
        "base": 0 if model.adapters else e * model.parameters,
        "ema": 4 * model.trained + frozen,
        "refreshed": 4 * model.trained + frozen,
        "live": 0,
    }
    teacher = teachers[weights.teacher] if weights.teacher else 0
    return 16 * model.trained + frozen + teacher, e * (model.parameters + model.adapters)


def loss_plan(model: ModelShape, step: StepShape, weights: Weights) -> TilePlan:
    """Return how selfdistill_kernels cuts the loss of one pass into tiles."""
    return TilePlan.choose(
        tokens=min(step.tokens_per_pass, step.completion_tokens),
        hidden=model.hidden,
        vocabulary=model.vocabulary,
        models=1 if weights.teacher is None else 2,
        itemsize=weights.itemsize,
        need_weight=not model.adapters,
    )


def plan_flops(model: ModelShape, step: StepShape, weights: Weights) -> dict[str, float]:
    """Return the FLOPs of each phase of a step; the module says how they are found."""

    def forward(tokens: int, keys: float) -> float:
        attention = 4 * model.layers * model.heads * model.head_dim * keys
        return tokens * (2 * model.matrix_parameters + attention)

    keys = step.prompt + step.completion / 2
    logits = 2.0 * step.completion_tokens * model.hidden * model.vocabulary
    student = forward(step.student_tokens, keys)
    teacher = {}
    if weights.teacher is not None:
        tokens = step.teacher_tokens(borrows=weights.teacher == "live")
        teacher = {"teacher forward": forward(tokens, keys + step.context)}
    plan = loss_plan(model, step, weights)
    sweeps = 1 if plan.strategy == "store" else 2
    gemms = sweeps * plan.models + 1 + (not model.adapters)
    return {
        "rollout": student + logits,
        "student forward": student,
        "student backward": student * ((1 if model.adapters else 2) + weights.checkpointing),
        **teacher,
        "loss": gemms * logits,
    }


def time_shares(flops: dict[str, float]) -> dict[str, float]:
    """Return the share of the time of each phase, 0 to 1."""
    time = {name: f / (ROLLOUT_RATE if name == "rollout" else 1.0) for name, f in flops.items()}
    total = sum(time.values())
    return {name: t / total for name, t in time.items()}
