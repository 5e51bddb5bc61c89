"""The usual step, every rollout a padded row of its own, and how far a shared step is from it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from exactness import assert_no_worse_than_torch
from peft import PeftModel
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from selfdistill.model.layout import PromptGroup
from selfdistill.model.scoring import score
from selfdistill.model.teacher import BaseTeacher, LiveTeacher, Teacher

ModelFactory = Callable[..., PreTrainedModel]


def padded_hidden(
    model: PreTrainedModel, prompts: list[list[int]], completions: list[list[int]]
) -> torch.Tensor:
    """Hidden states that predict each completion token, [T, H]: one padded row per rollout."""
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = base.get_decoder()(
        input_ids=ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return torch.cat(
        [
            hidden[i, len(p) - 1 : len(p) + len(c) - 1]
            for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
    )


def padded_two_pass(
    student: PreTrainedModel, teacher: PreTrainedModel, groups: list[PromptGroup]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual step: every rollout a padded row of its own, for student and for teacher."""
    completions = [c for g in groups for c in g.completions]
    student_prompts = [g.student_prompt for g in groups for _ in g.completions]
    teacher_prompts = [t for g in groups for t in g.teacher_prompts]
    student_hidden = padded_hidden(student, student_prompts, completions)
    with torch.no_grad():
        teacher_hidden = padded_hidden(teacher, teacher_prompts, completions)
    return student_hidden, teacher_hidden


def forward_kl(
    student: PreTrainedModel,
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    *,
    teacher: PreTrainedModel | None = None,
) -> torch.Tensor:
    """The mean over tokens; `teacher` when its head is not the student's."""
    weight = student.get_output_embeddings().weight
    teacher_weight = (teacher or student).get_output_embeddings().weight.detach()
    student_logprobs = log_softmax(student_hidden @ weight.T, dim=-1)
    teacher_logprobs = log_softmax(teacher_hidden @ teacher_weight.T, dim=-1)
    return kl_div(student_logprobs, teacher_logprobs, log_target=True, reduction="batchmean")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that computes in float64.

    Norms and rotary embeddings round to float32 whatever the dtype, in every library: for a third
    or less of what a pass in float32 is off by.
    """
    copied = copy.deepcopy(model).double()
    base = copied.get_base_model() if isinstance(copied, PeftModel) else copied
    base.set_experts_implementation("eager")  # torch's grouped products take no float64
    return copied


# Hidden states, and gradients of the student's parameters.
StepResults = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def step_results(
    student: PreTrainedModel,
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    *,
    teacher: PreTrainedModel | None = None,
) -> StepResults:
    forward_kl(student, student_hidden, teacher_hidden, teacher=teacher).backward()
    hidden = {"student": student_hidden.detach(), "teacher": teacher_hidden}
    return hidden, gradients(student)


def padded_results(
    models: tuple[PreTrainedModel, PreTrainedModel], groups: list[PromptGroup]
) -> tuple[StepResults, StepResults]:
    """The padded step of (student, teacher): in their own dtype, and in float64."""
    torchs, exact = (
        step_results(student, *padded_two_pass(student, teacher, groups))
        for student, teacher in (models, tuple(map(in_float64, models)))
    )
    return torchs, exact


def assert_step_is_exact(
    student: PreTrainedModel,
    teacher: Teacher,
    reference: tuple[PreTrainedModel, PreTrainedModel],
    groups: list[PromptGroup],
) -> None:
    """The prefix-shared step is no further from float64 than the padded step of `reference` is."""
    torchs, exact = padded_results(reference, groups)
    scored = score(student, teacher, groups)
    ours = step_results(student, scored.student_hidden, scored.teacher_hidden)
    for name, *results in zip(("hidden states", "gradients"), ours, torchs, exact, strict=True):
        assert_no_worse_than_torch(name, *results)


def make_step(
    tiny_model: ModelFactory, family: str, teacher: str
) -> tuple[PreTrainedModel, Teacher, tuple[PreTrainedModel, PreTrainedModel]]:
    """Return the student, its teacher, and the models of the padded reference step."""
    student, reference = tiny_model(family), tiny_model(family)
    if teacher == "live":
        return student, LiveTeacher(), (reference, reference)
    base = tiny_model(family, seed=1)
    return student, BaseTeacher(copy.deepcopy(base)), (reference, base)
