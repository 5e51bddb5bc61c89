from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from selfdistill.config import LossConfig
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.model.layout import PromptGroup, pack_groups
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.teacher import LiveTeacher
from selfdistill.training.gradients import StudentLoss, accumulate_gradients
from selfdistill.training.microbatch import split_by_tokens


def group(completion: int, *, rollouts: int = 2) -> PromptGroup:
    """4 prompt tokens, 3 more of context; every completion starts with its own token."""
    return PromptGroup(
        student_prompt=[1, 2, 3, 4],
        teacher_prompts=[[1, 2, 5, 6, 7, 3, 4]] * rollouts,
        completions=[[10 + i] * completion for i in range(rollouts)],
    )


def tokens(groups: list[PromptGroup], *, share: bool) -> int:
    return pack_groups(groups, share_student_prefix=share).statistics.packed_tokens


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("order", [1, -1])
def test_no_pass_exceeds_the_budget_but_a_single_group(share: bool, order: int) -> None:
    groups = [group(n) for n in (3, 30, 5, 8, 2, 9, 4)][::order]
    budget = tokens([group(9)], share=share)
    passes = split_by_tokens(groups, max_tokens=budget, share_student_prefix=share)
    assert sorted(map(id, groups)) == sorted(id(g) for batch in passes for g in batch)
    assert [g.completions for g in passes[0]] == [group(30).completions]  # alone, and first
    assert all(tokens(batch, share=share) <= budget for batch in passes[1:])
    total = sum(tokens([g], share=share) for g in groups) - tokens([group(30)], share=share)
    assert len(passes) - 1 <= -(-total // budget) + 1
    sizes = [sorted(len(g.completions[0]) for g in batch) for batch in passes]
    assert sizes == [
        sorted(len(g.completions[0]) for g in batch)
        for batch in split_by_tokens(groups[::-1], max_tokens=budget, share_student_prefix=share)
    ]


def test_no_groups_need_no_pass() -> None:
    assert split_by_tokens([], max_tokens=1, share_student_prefix=False) == []


def test_memory_follows_the_budget(tiny_model: Callable[..., PreTrainedModel]) -> None:
    """The largest sum of saved activations alive at once, per budget."""
    groups = [group(12) for _ in range(8)]
    one = tokens(groups[:1], share=True)
    peaks = []
    for share_of_all in (8, 4, 2, 1):
        student = tiny_model("llama")
        alive = peak = 0

        class Saved:
            def __init__(self, tensor: torch.Tensor) -> None:
                nonlocal alive, peak
                self.tensor = tensor
                alive += tensor.numel()
                peak = max(peak, alive)

            def __del__(self) -> None:
                nonlocal alive
                alive -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            accumulate_gradients(
                StudentLoss(
                    student,
                    LiveTeacher(),
                    DistillationLoss(LossConfig()),
                    lm_heads=find_lm_heads(student, LiveTeacher()),
                ),
                groups,
                tokens_per_pass=share_of_all * one,
            )
        peaks.append(peak)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.4 * peaks[0]  # the weights, which are saved too, do not shrink
