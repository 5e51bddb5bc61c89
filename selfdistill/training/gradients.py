"""From prompt groups to gradients: one pass as a module, and the passes of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from selfdistill.methods.loss import Loss
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import LMHead
from selfdistill.model.parts import is_sharded, whole
from selfdistill.model.scoring import ScoredTokens, score
from selfdistill.model.teacher import Teacher
from selfdistill.model.weights import Student
from selfdistill.training.distributed import ALONE, Ranks
from selfdistill.training.microbatch import split_by_tokens
from selfdistill_kernels import DistillationOutput

Observer = Callable[[Sequence[PromptGroup], ScoredTokens, DistillationOutput], None]


class StudentLoss(nn.Module):
    """A whole forward pass: student and teacher score prompt groups, and the loss compares them.

    It is a module because of FSDP2, which gathers weights when a module is called: everything that
    reads a weight, the lm_head inside the fused loss too, happens within this one's call.

    Args:
        student: gets the gradients.
        teacher: scores the same completions with more context; None for a method without one.
        loss: the method's loss.
        lm_heads: of the student and of the teacher.
        attention: who computes it, see `selfdistill.model.attention.choose_backend`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        loss: Loss,
        *,
        lm_heads: tuple[LMHead, LMHead],
        attention: str = "auto",
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        # A submodule, so that a teacher with weights of its own is sharded, too.
        self.teacher_model = None if teacher is None else teacher.model
        self.loss = loss
        self.lm_heads = lm_heads
        self.attention = attention

    @property
    def shares_prefix(self) -> bool:
        """True when the teacher reads the prompt's keys and values from the student's pass."""
        return self.teacher is not None and self.teacher.has_student_weights

    def shard(self, *, compute_dtype: torch.dtype) -> None:
        """Spread the weights of student and teacher over the ranks (`selfdistill.model.sharding`).

        Args:
            compute_dtype: what the models compute in, and are in now.
        """
        from selfdistill.model.sharding import shard

        if self.teacher is not None:
            self.teacher.hold_float32()
        models = [m for m in (self.student, self.teacher_model) if m is not None]
        shard(self, models, compute_dtype=compute_dtype)

    def forward(
        self, groups: Sequence[PromptGroup], *, normalizer: float
    ) -> tuple[torch.Tensor, ScoredTokens, DistillationOutput]:
        """Return the loss (a scalar, the sum over tokens / normalizer), its tokens, its figures."""
        scored = score(self.student, self.teacher, groups, attention=self.attention)
        output = self.loss(scored, *self.lm_heads, normalizer=normalizer)
        return output.loss, scored, output


@dataclass
class Totals:
    """Sums over the completion tokens that were read in one step.

    `loss` is already divided by the step's denominator; `tokens` counts those not read, too.
    """

    tokens: int
    tokens_read: int = 0
    loss: float = 0.0
    kl: float = 0.0
    advantage: float = 0.0
    entropy: float = 0.0
    active: int = 0
    packed_tokens: int = 0
    unshared_tokens: int = 0

    def per_token(self, total: float) -> float | None:
        """Return a sum's mean over the tokens that were read; None when there are none."""
        return total / self.tokens_read if self.tokens_read else None

    def over(self, ranks: Ranks) -> Totals:
        """Return the totals of all ranks."""
        parts = asdict(self)
        summed = zip(parts.items(), ranks.sum(*parts.values()), strict=True)
        return Totals(**{name: type(part)(total) for (name, part), total in summed})


def accumulate_gradients(
    objective: StudentLoss,
    groups: Sequence[PromptGroup],
    *,
    tokens_per_pass: int,
    ranks: Ranks = ALONE,
    observe: Observer | None = None,
) -> Totals:
    """Add the gradient of the step's mean loss to the student's parameters.

    Every pass divides by the denominator of all groups of all ranks, so the gradient does not
    depend on which groups one pass takes. Unless the weights are sharded (FSDP2 sums over the ranks
    after each pass) it still has to be summed over the ranks. Groups without gradient are not read.

    Args:
        objective: the pass.
        groups: all prompt groups of this rank's share of the step; none is fine.
        tokens_per_pass: most packed tokens that are scored at once.
        ranks: the processes that share the step.
        observe: is shown the groups of each pass, their tokens and their figures.

    Returns:
        The totals of all ranks.
    """
    loss = objective.loss
    totals = Totals(tokens=sum(group.num_tokens for group in groups))
    (denominator,) = ranks.sum(sum(loss.denominator(group) for group in groups))
    passes = split_by_tokens(
        [group for group in groups if loss.learns_from(group)],
        max_tokens=tokens_per_pass,
        share_student_prefix=objective.shares_prefix,
        with_teacher=objective.teacher is not None,
    )
    # Every pass gathers weights from all ranks, so all of them need equally many.
    idle = int(ranks.max(len(passes))) - len(passes) if is_sharded(objective) else 0
    for microbatch in passes:
        total, scored, output = objective(microbatch, normalizer=denominator)
        total.backward()
        if observe is not None:
            observe(microbatch, scored, output)
        assert output.advantage is not None  # the loss was given the sampled tokens
        totals.tokens_read += len(scored.targets)
        totals.loss += output.loss.item()
        totals.kl += output.divergence.sum().item()
        totals.advantage += output.advantage.sum().item()
        totals.entropy += output.entropy.sum().item()
        totals.active += int(output.active.sum())
        totals.packed_tokens += scored.statistics.packed_tokens
        totals.unshared_tokens += scored.statistics.unshared_tokens
    for _ in range(idle):
        total, *_ = objective([_IDLE], normalizer=1.0)
        (0.0 * total).backward()
    return totals.over(ranks)


# Elements whose squares torch adds up with an error of 1e-5 at most.
_PART = 2**20


def clip_gradients(parameters: Iterable[torch.Tensor], *, max_norm: float) -> torch.Tensor:
    """Scale gradients whose norm together is larger than `max_norm`; return that norm.

    torch.nn.utils.clip_grad_norm_ does this, but on a CPU it adds up the squares of a tensor in a
    few running float32 sums: the norm of an lm_head's gradient comes out 0.2 to 4 % too small
    (findings/vector_norm_of_a_large_gradient_is_too_small.sh). Large gradients are read in parts
    here; those that FSDP2 has divided are left to torch.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    parts = [part for parameter in parameters for part in _parts(parameter.grad)]
    norm = torch.nn.utils.get_total_norm(parts)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return whole(norm)


def _parts(gradient: torch.Tensor | None) -> Sequence[torch.Tensor]:
    assert gradient is not None
    if isinstance(gradient, DTensor) or not gradient.is_contiguous():
        return [gradient]
    return gradient.view(-1).split(_PART) if gradient.numel() > _PART else [gradient]


# One token, for a pass that only takes part.
_IDLE = PromptGroup(
    [0],
    [[0]],
    [[0]],
    rewards=[0.0],
    old_logprobs=[[0.0]],
    steps=[[-1]],
    wrong=[[False]],
    contrast_prompts=[[0]],
)
