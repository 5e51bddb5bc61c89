"""Does an engine sample from the weights that are trained? Its log-probs tell.

An engine with weights of its own can go on with old ones, or with an old head, without any error:
the text stays fluent, and the student learns from another model's attempts. The trainer's own
log-probs of the sampled tokens are the only check that sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from selfdistill.errors import UserError
from selfdistill.model.attention import enable_prefix_sharing, run_packed_row
from selfdistill.model.layout import PromptGroup, pack_groups
from selfdistill.model.lm_head import LMHead
from selfdistill.rollout.engine import Rollout
from selfdistill_kernels import fused_linear_logprobs


class EngineMismatchError(UserError):
    """The engine sampled from other weights than the trainer's.

    Attributes:
        difference: the largest difference between the two log-probs of a sampled token, in nats.
        tolerance: the largest one that was allowed.
    """

    def __init__(self, message: str, *, difference: float, tolerance: float) -> None:
        super().__init__(message)
        self.difference = difference
        self.tolerance = tolerance


def check_agreement(
    model: nn.Module,
    head: LMHead,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Rollout]],
    *,
    temperature: float,
    tolerance: float,
    attention: str = "auto",
) -> float:
    """Compare the engine's log-probs with those of the trainer's model, over one packed row.

    Args:
        model: what is trained, a causal LM or a PEFT wrapper of one; its float32 weights, without
            autocast.
        head: how it makes logits.
        prompts: token ids.
        groups: the rollouts of each prompt, fresh: sampled since the last change of the weights.
        temperature: that they were sampled at.
        tolerance: the largest difference that is allowed, in nats.
        attention: who computes it here, see `selfdistill.model.attention.choose_backend`.

    Returns:
        The largest difference between two log-probs of one token, in nats.

    Raises:
        EngineMismatchError: it is more than `tolerance`, or not a number.
    """
    sampled = [
        PromptGroup(list(prompt), [list(prompt)] * len(group), [r.token_ids for r in group])
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    enable_prefix_sharing(model, backend=attention)
    pack = pack_groups(sampled, share_student_prefix=False, with_teacher=False)
    with torch.no_grad(), torch.autocast(head.weight.device.type, enabled=False):
        hidden = run_packed_row(model, pack.student, backend=attention)
        own = fused_linear_logprobs(
            hidden,
            head.weight,
            pack.targets.to(hidden.device),
            bias=head.bias,
            temperature=temperature or 1.0,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
        ).logprobs
    theirs = torch.tensor([lp for group in groups for r in group for lp in r.logprobs])
    differences = (own.cpu() - theirs).abs()
    worst = int(differences.argmax())
    difference = differences[worst].item()
    if not difference <= tolerance:  # a NaN is not
        raise EngineMismatchError(
            f"the rollout engine and the trainer disagree by {difference:.2e} nats about token "
            f"{int(pack.positions[worst])} of rollout {int(pack.rollout_index[worst])} "
            f"({theirs[worst]:.4f} there, {own[worst]:.4f} here), expected at most "
            f"{tolerance:.0e}: the engine samples from other weights than those that are trained. "
            "Nothing was learned from these rollouts. If only the precision differs, raise "
            "rollout.engine.tolerance or set rollout.engine.dtype: float32",
            difference=difference,
            tolerance=tolerance,
        )
    return difference
