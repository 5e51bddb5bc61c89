"""Hidden states of student (with gradient) and teacher (without) for every completion token.

Both roles read packed rows (`selfdistill.model.layout`) with prefix-tree attention
(`selfdistill.model.attention`); the lm_head is left to the loss, so no logits are made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from selfdistill.model.attention import PrefixStash, enable_prefix_sharing, run_packed_row
from selfdistill.model.layout import PackingStatistics, PromptGroup, pack_groups
from selfdistill.model.randomness import check_not_random
from selfdistill.model.teacher import Teacher


@dataclass(frozen=True)
class ScoredTokens:
    """What a distillation loss needs, for T = the sum of the completion lengths.

    Tokens follow each other rollout after rollout, in the order of the groups.

    Attributes:
        student_hidden: [T, H] final hidden states, with gradient, in the student's dtype.
        teacher_hidden: [T, H_t] likewise of the teacher, without gradient; None without one.
        targets: [T] int64, the completion tokens.
        rollout_index: [T] int64, the rollout of each token, counted through all groups from 0.
        positions: [T] int64, the token's place within its completion, from 0.
        statistics: tokens read, against the usual two-pass step.
        rollout_group: [R] int64, the group of each of the R rollouts.
        rewards: [R] float32 of each rollout, or None.
        old_logprobs: [T] float32, sampling log-probs of the completion tokens (nats), or None.
        steps: [T] int64, the step of each token, counted from 0 in each rollout, -1 outside of
            steps; or None.
        wrong: [T] bool, the tokens of each rollout's first wrong step; or None.
        contrast_hidden: like `teacher_hidden`, of a teacher that is given the contrast prompts;
            None without those.
        has_context: [R] bool, whether the teacher sees more of the rollout than the student; None
            without a teacher.
    """

    student_hidden: torch.Tensor
    teacher_hidden: torch.Tensor | None
    targets: torch.Tensor
    rollout_index: torch.Tensor
    positions: torch.Tensor
    statistics: PackingStatistics
    rollout_group: torch.Tensor
    rewards: torch.Tensor | None = None
    old_logprobs: torch.Tensor | None = None
    steps: torch.Tensor | None = None
    wrong: torch.Tensor | None = None
    contrast_hidden: torch.Tensor | None = None
    has_context: torch.Tensor | None = None


def score(
    student: torch.nn.Module,
    teacher: Teacher | None,
    groups: Sequence[PromptGroup],
    *,
    attention: str = "auto",
) -> ScoredTokens:
    """Score every completion token by student and teacher, each over one packed row.

    Works with activation checkpointing on and off, in train and in eval mode: nothing in a pass may
    be random, so both give the same numbers. Sets prefix-tree attention on the models on first use.

    Args:
        student: a transformers causal LM, or a PEFT wrapper of one.
        teacher: the teacher strategy; None scores by the student alone.
        groups: the prompt groups of this step; memory grows with their tokens.
        attention: who computes the attention, see `selfdistill.model.attention.choose_backend`.

    Raises:
        RandomModelError: a pass would be random, see `selfdistill.model.randomness`.
        UnsupportedModelError: the architecture cannot share prefixes exactly.
        UnavailableBackendError: the attention backend that was asked for cannot run.
    """
    check_not_random(student)
    enable_prefix_sharing(student, backend=attention)
    # Keys and values of the student's weights are wrong for other weights: after 10 LoRA steps the
    # error was 78 % of the signal.
    share = teacher is not None and teacher.has_student_weights
    pack = pack_groups(groups, share_student_prefix=share, with_teacher=teacher is not None)

    # The student first: the teacher may borrow keys and values that this pass makes.
    stash = PrefixStash(pack.teacher.borrowed_index) if share and pack.teacher else None
    student_hidden = run_packed_row(student, pack.student, capture=stash, backend=attention)
    device = student_hidden.device
    teacher_hidden = None
    if teacher is not None and pack.teacher is not None:
        with torch.no_grad(), teacher.weights(student) as teacher_model:
            check_not_random(teacher_model)
            enable_prefix_sharing(teacher_model, backend=attention)
            teacher_hidden = run_packed_row(
                teacher_model, pack.teacher, borrow=stash, backend=attention
            ).to(device)
    if stash is not None:
        stash.free()
    contrast_hidden = None
    if teacher_hidden is not None and all(g.contrast_prompts is not None for g in groups):
        # The teacher's row has the completions of each group twice.
        halves = teacher_hidden.split([g.num_tokens for g in groups for _ in range(2)])
        teacher_hidden, contrast_hidden = torch.cat(halves[::2]), torch.cat(halves[1::2])

    def per_token(name: str) -> torch.Tensor | None:
        rows = [getattr(group, name) for group in groups]
        return _concatenated([None if row is None else [*chain(*row)] for row in rows], device)

    return ScoredTokens(
        student_hidden=student_hidden,
        teacher_hidden=teacher_hidden,
        targets=pack.targets.to(device),
        rollout_index=pack.rollout_index.to(device),
        positions=pack.positions.to(device),
        statistics=pack.statistics,
        rollout_group=torch.repeat_interleave(
            torch.tensor([len(group.completions) for group in groups], device=device)
        ),
        rewards=_concatenated([group.rewards for group in groups], device),
        old_logprobs=per_token("old_logprobs"),
        steps=per_token("steps"),
        wrong=per_token("wrong"),
        contrast_hidden=contrast_hidden,
        has_context=None
        if teacher is None
        else torch.tensor(
            [prompt != g.student_prompt for g in groups for prompt in g.teacher_prompts],
            device=device,
        ),
    )


def _concatenated(parts: Sequence[list[float] | None], device: torch.device) -> torch.Tensor | None:
    """Return one tensor of all groups' numbers, or None when a group does not know them."""
    numbers = [number for part in parts if part is not None for number in part]
    return None if None in parts else torch.tensor(numbers, device=device)
