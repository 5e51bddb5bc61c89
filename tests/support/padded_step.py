"""The usual step, every rollout a padded row of its own, and how far a shared step is from it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import PeftModel
from torch.nn.functional import kl_div, log_softmax
from transformers import PreTrainedModel

from selfdistill.layout import PromptGroup
from selfdistill.scoring import score
from selfdistill.teacher import BaseTeacher, LiveTeacher, Teacher

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
    student: PreTrainedModel, student_hidden: torch.Tensor, teacher_hidden: torch.Tensor
) -> torch.Tensor:
    weight = student.get_output_embeddings().weight
    student_logprobs = log_softmax(student_hidden @ weight.T, dim=-1)
    teacher_logprobs = log_softmax(teacher_hidden @ weight.detach().T, dim=-1)
    return kl_div(student_logprobs, teacher_logprobs, log_target=True, reduction="batchmean")


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst_relative_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest over the entries of max |difference| / max |expected|."""
    assert got.keys() == expected.keys()
    return max(
        ((got[name] - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name in expected
    )


def step_errors(
    student: PreTrainedModel,
    teacher: Teacher,
    reference: tuple[PreTrainedModel, PreTrainedModel],
    groups: list[PromptGroup],
) -> tuple[float, float]:
    """Relative errors of hidden states and of gradients of one prefix-shared step."""
    expected = padded_two_pass(*reference, groups)
    forward_kl(reference[0], *expected).backward()
    scored = score(student, teacher, groups)
    forward_kl(student, scored.student_hidden, scored.teacher_hidden).backward()
    values = {"student": scored.student_hidden, "teacher": scored.teacher_hidden}
    return (
        worst_relative_error(values, dict(zip(values, expected, strict=True))),
        worst_relative_error(gradients(student), gradients(reference[0])),
    )


def make_step(
    tiny_model: ModelFactory, family: str, teacher: str
) -> tuple[PreTrainedModel, Teacher, tuple[PreTrainedModel, PreTrainedModel]]:
    """Return the student, its teacher, and the models of the padded reference step."""
    student, reference = tiny_model(family), tiny_model(family)
    if teacher == "live":
        return student, LiveTeacher(), (reference, reference)
    base = tiny_model(family, seed=1)
    return student, BaseTeacher(copy.deepcopy(base)), (reference, base)
