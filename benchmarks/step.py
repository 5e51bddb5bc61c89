"""One training step without the optimiser: student and live teacher forward, loss, backward.

The same problem through three steps with the same loss, the mean forward KL(teacher || student)
over all completion tokens, whole vocabulary:

    naive    every rollout a padded row of its own for each role; our fused loss
    shared   one packed row for each role, the prefix read once and lent to the teacher; our fused
             loss: `selfdistill.model.scoring.score`
    trl      TRL's own SDPO step: `SDPOTrainer.compute_loss` with full logits and a live teacher, on
             a batch made here (its trainer's rollouts, rewards and data loading take no part)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from selfdistill.model.layout import PackedRow, PromptGroup, pack_groups
from selfdistill.model.scoring import score
from selfdistill.model.teacher import LiveTeacher
from selfdistill_kernels import fused_linear_distillation

# What follows the context in the teacher's prompt and the question in the student's: the end of the
# turn. It is not part of the shared prefix.
TAIL = 4


@dataclass(frozen=True)
class StepShape:
    """Tokens of the prompt, of a response and of a context, and rollouts of the one group."""

    prompt: int
    response: int
    context: int
    group: int

    @classmethod
    def parse(cls, text: str) -> StepShape:
        """Read "P/R/C/G".

        Raises:
            ValueError: not four positive integers, or a prompt that is all tail.
        """
        parts = text.split("/")
        if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"shape: expected P/R/C/G such as 512/128/128/8, got {text!r}")
        shape = cls(*map(int, parts))
        if shape.prompt <= TAIL:
            raise ValueError(f"shape: expected a prompt of more than {TAIL} tokens, got {text!r}")
        return shape

    def __str__(self) -> str:
        return f"{self.prompt}/{self.response}/{self.context}/{self.group}"


SHAPES = (StepShape(512, 128, 128, 8), StepShape(128, 512, 128, 8))


@dataclass(frozen=True)
class ModelSize:
    """SmolLM2-135M with 4 of its 30 layers.

    The vocabulary shrinks along, from 49152, so that the head keeps its share of the work.
    """

    family: str = "llama"
    layers: int = 4
    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    vocabulary: int = 6656

    def build(self) -> PreTrainedModel:
        """Random weights, always the same, float32."""
        config = {"llama": LlamaConfig, "qwen3": Qwen3Config}[self.family](
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            # Larger than usual: otherwise attention is nearly uniform, student and teacher agree,
            # and the gradients are mostly rounding.
            initializer_range=self.hidden**-0.5,
        )
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).train()


@dataclass(frozen=True)
class StepProblem:
    """One model and one prompt group.

    Attributes:
        shape: of the group.
        size: of the model.
        device: where it computes; dtype: of its weights. Buffers keep theirs, as in training:
            rotary frequencies rounded to 16 bits turn far tokens by other angles.
    """

    shape: StepShape
    size: ModelSize
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @cached_property
    def model(self) -> PreTrainedModel:
        model = self.size.build()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        return model.to(self.device)

    @cached_property
    def group(self) -> PromptGroup:
        """Random tokens; contexts differ from their first token on."""
        generator = torch.Generator().manual_seed(1)
        shape = self.shape

        def tokens(length: int) -> list[int]:
            return torch.randint(3, self.size.vocabulary, (length,), generator=generator).tolist()

        prompt = tokens(shape.prompt)
        return PromptGroup(
            student_prompt=prompt,
            teacher_prompts=[
                [*prompt[:-TAIL], *tokens(shape.context), *prompt[-TAIL:]]
                for _ in range(shape.group)
            ],
            completions=[tokens(shape.response) for _ in range(shape.group)],
        )


Step = Callable[[], Tensor]


def naive(problem: StepProblem) -> Step:
    """Rows of equal length here, so that padding costs the naive step nothing."""
    model, group, response = problem.model, problem.group, problem.shape.response
    completions = torch.tensor(group.completions, device=problem.device)
    prompts = torch.tensor([group.student_prompt] * len(completions), device=problem.device)
    student_ids = torch.cat([prompts, completions], dim=1)
    teacher_prompts = torch.tensor(group.teacher_prompts, device=problem.device)
    teacher_ids = torch.cat([teacher_prompts, completions], dim=1)

    def hidden(ids: Tensor) -> Tensor:
        rows = model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        return rows[:, -response:].flatten(0, 1)

    def step() -> Tensor:
        _use(model, "sdpa")
        student = hidden(student_ids)
        with torch.no_grad():
            teacher = hidden(teacher_ids)
        return _fused_loss(model, student, teacher, completions.flatten())

    return step


def shared(problem: StepProblem, *, attention: str = "auto") -> Step:
    """What the trainer does with one group.

    Args:
        attention: who computes it (`selfdistill.model.attention.choose_backend`).
    """
    model, teacher = problem.model, LiveTeacher()
    # Checks the model once, as training does.
    score(model, teacher, [problem.group], attention=attention)

    def step() -> Tensor:
        _use(model, "selfdistill_prefix_tree")
        scored = score(model, teacher, [problem.group], attention=attention)
        assert scored.teacher_hidden is not None  # a teacher was given
        return _fused_loss(model, scored.student_hidden, scored.teacher_hidden, scored.targets)

    return step


def trl(problem: StepProblem) -> Step:
    """Needs trl; only what `compute_loss` reads is set on the trainer."""
    from trl.experimental.sdpo import SDPOTrainer

    model, group = problem.model, problem.group
    trainer: Any = object.__new__(SDPOTrainer)
    trainer.args = SimpleNamespace(
        distillation_weight=1.0,
        distillation_mode="full_logits",
        distillation_alpha=0.0,
        distillation_is_clip=None,
        teacher_model_kind="live",
    )
    trainer.model = trainer.teacher_model = model
    trainer.model_kwarg_keys = {"logits_to_keep"}
    trainer.temperature = 1.0
    trainer.use_teacher_server = False
    trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator = SimpleNamespace(gather=lambda tensor: tensor)
    completions = torch.tensor(group.completions)
    prompts = torch.tensor([group.student_prompt] * len(completions))
    teacher_ids = torch.cat([torch.tensor(group.teacher_prompts), completions], dim=1)
    batch = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "teacher_input_ids": teacher_ids,
        "teacher_attention_mask": torch.ones_like(teacher_ids),
    }

    def step() -> Tensor:
        _use(model, "sdpa")
        trainer._metrics = {"train": defaultdict(list)}
        loss = trainer.compute_loss(model, batch)
        return _backward(model, loss)

    return step


CONTENDERS: dict[str, Callable[[StepProblem], Step]] = {
    "naive": naive,
    "shared": shared,
    "trl": trl,
}


def _use(model: PreTrainedModel, attention: str) -> None:
    if model.config._attn_implementation != attention:
        model.set_attn_implementation(attention)


def _fused_loss(
    model: PreTrainedModel, student: Tensor, teacher: Tensor, targets: Tensor
) -> Tensor:
    weight = model.get_output_embeddings().weight
    loss = fused_linear_distillation(
        student, teacher, weight, targets, objective="forward_kl", normalizer=len(targets)
    ).loss
    return _backward(model, loss)


def _backward(model: PreTrainedModel, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return loss.detach()


# ---- the bound -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one step, by where they go."""

    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.head


def step_flops(problem: StepProblem, *, share: bool) -> Flops:
    """Multiplications and additions of the step's matrix products; nothing else is counted.

    With L = layers, N = parameters of a layer's linear maps, D = heads * head_dim, H = hidden size,
    V = vocabulary, T = completion tokens, and for each role its tokens n and query-key pairs p:

        linear     2 L N (3 n_student + n_teacher)           backward is twice the forward pass
        attention  4 L D p_teacher + (4 + 10) L D p_student  two products forward, five backward
        head       8 T H V                                   two models' logits, dH, dW

    Pairs are those that the causal mask leaves.
    """
    size, shape = problem.size, problem.shape
    if share:
        pack = pack_groups([problem.group], share_student_prefix=True)
        assert pack.teacher is not None  # asked for by default
        tokens = [row.input_ids.shape[1] for row in (pack.student, pack.teacher)]
        pairs = [row_pairs(row) for row in (pack.student, pack.teacher)]
    else:
        lengths = [shape.prompt + shape.response - 1]
        lengths.append(lengths[0] + shape.context)
        tokens = [shape.group * length for length in lengths]
        pairs = [shape.group * length * (length + 1) // 2 for length in lengths]
    width = size.heads * size.head_dim
    maps = size.hidden * (2 * width + 2 * size.kv_heads * size.head_dim + 3 * size.intermediate)
    return Flops(
        linear=2 * size.layers * maps * (3 * tokens[0] + tokens[1]),
        attention=size.layers * width * (14 * pairs[0] + 4 * pairs[1]),
        head=8 * shape.group * shape.response * size.hidden * size.vocabulary,
    )


def row_pairs(row: PackedRow) -> int:
    """Query-key pairs that the prefix tree's mask leaves."""
    own = [(len(segment.own), segment.num_keys) for segment in row.segments]
    return sum(queries * (keys - queries) + queries * (queries + 1) // 2 for queries, keys in own)
