"""Does an engine sample from the weights that are trained? Its log-probs tell.

An engine with weights of its own can go on with old ones, or with an old head, without any error:
the text stays fluent, and the student learns from another model's attempts. The trainer's own
log-probs of the sampled tokens are the only check that sees it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from selfdistill.errors import UserError
from selfdistill.model.attention import enable_prefix_sharing, run_packed_row
from selfdistill.model.layout import Pack, PromptGroup, pack_groups
from selfdistill.model.lm_head import LMHead
from selfdistill.rollout.engine import Rollout, SamplingParams
from selfdistill.rollout.sampling import truncate
from selfdistill_kernels import fused_linear_logprobs

# Rows of logits that are in memory at one time.
_ROWS = 64


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
    params: SamplingParams,
    tolerance: float,
    attention: str = "auto",
) -> float:
    """Compare the engine's log-probs with those of the trainer's model, over one packed row.

    Where sampling cuts something off, an engine's log-prob lies between two own ones: rounding
    decides about tokens at the edge of what is kept.

    Args:
        model: what is trained, a causal LM or a PEFT wrapper of one; its float32 weights, without
            autocast.
        head: how it makes logits.
        prompts: token ids.
        groups: the rollouts of each prompt, fresh: sampled since the last change of the weights.
        params: how they were sampled.
        tolerance: the largest difference that is allowed, in nats.
        attention: who computes it here, see `selfdistill.model.attention.choose_backend`.

    Returns:
        The largest difference between two log-probs of one token, in nats.

    Raises:
        EngineMismatchError: it is more than `tolerance`, or not a number.
    """
    temperature = params.temperature or 1.0
    pack, hidden, own = _read(model, head, prompts, groups, temperature, attention)
    least = most = own
    if params.truncates:
        least, most = _between(head, hidden, pack.targets, params, tolerance=tolerance)
    theirs = torch.tensor([lp for group in groups for r in group for lp in r.logprobs])
    differences = torch.maximum(least.cpu() - theirs, theirs - most.cpu()).clamp(min=0)
    worst = int(differences.argmax())
    difference = differences[worst].item()
    if not difference <= tolerance:  # a NaN is not
        raise EngineMismatchError(
            f"the rollout engine and the trainer disagree by {difference:.2e} nats about token "
            f"{int(pack.positions[worst])} of rollout {int(pack.rollout_index[worst])} "
            f"({theirs[worst]:.4f} there, {least[worst]:.4f} here), expected at most "
            f"{tolerance:.0e}: the engine samples from other weights than those that are trained. "
            "Nothing was learned from these rollouts. If only the precision differs, raise "
            "rollout.engine.tolerance or set rollout.engine.dtype: float32. A server says what it "
            "sampled from only with --logprobs-mode processed_logprobs",
            difference=difference,
            tolerance=tolerance,
        )
    return difference


def with_own_logprobs(
    model: nn.Module,
    head: LMHead,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Rollout]],
    *,
    temperature: float,
    attention: str = "auto",
) -> list[list[Rollout]]:
    """Add what an engine does not say that cuts something off: `Rollout.log_kept`.

    It is the trainer's own log-prob at the temperature, less the engine's, so that the loss
    compares its log-probs with those of the same model. One pass, without gradient.

    Args:
        model, head, prompts, groups, temperature, attention: see `check_agreement`.
    """
    known = []
    for prompt, group in zip(prompts, groups, strict=True):
        own = _read(model, head, [prompt], [group], temperature, attention)[2].cpu()
        parts = own.split([len(rollout.token_ids) for rollout in group])
        known.append(
            [
                replace(rollout, log_kept=(part - torch.tensor(rollout.logprobs)).tolist())
                for rollout, part in zip(group, parts, strict=True)
            ]
        )
    return known


def _read(
    model: nn.Module,
    head: LMHead,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Rollout]],
    temperature: float,
    attention: str,
) -> tuple[Pack, Tensor, Tensor]:
    """Return the packed rollouts, hidden states [T, H] and log-probs [T] of their tokens."""
    sampled = [
        PromptGroup(list(prompt), [list(prompt)] * len(group), [r.token_ids for r in group])
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    enable_prefix_sharing(model, backend=attention)
    pack = pack_groups(sampled, share_student_prefix=False, with_teacher=False)
    with torch.no_grad(), torch.autocast(head.weight.device.type, enabled=False):
        hidden = run_packed_row(model, pack.student, backend=attention)
        logprobs = fused_linear_logprobs(
            hidden,
            head.weight,
            pack.targets.to(hidden.device),
            bias=head.bias,
            temperature=temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
        ).logprobs
    return pack, hidden, logprobs


@torch.no_grad()
def _between(
    head: LMHead, hidden: Tensor, targets: Tensor, params: SamplingParams, *, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Return the least and the largest log-prob that a token may have been drawn with, [T] each.

    Args:
        head: how the model makes logits.
        hidden: [T, H].
        targets: [T] int64, the tokens.
        params: what is cut off.
        tolerance: how far off a log-prob may be, and so what is compared with the last one that
            is kept. Of a token outside of what is kept even then, both are -inf.
    """
    least, most = [], []
    # A token less decides little, so that here a share may be off by a little.
    edge, slack = min(tolerance, 0.02), math.exp(-tolerance)
    # A few rows of logits at a time.
    pieces = zip(hidden.split(_ROWS), targets.to(hidden.device).split(_ROWS), strict=True)
    for states, tokens in pieces:
        logits = head.values.logits(states).float()
        scores = torch.log_softmax(logits / params.temperature, -1)
        kept = truncate(
            scores,
            top_k=params.top_k,
            top_p=1 - (1 - params.top_p) * slack,
            min_p=params.min_p * slack,
        )
        last = kept.masked_fill(kept == -torch.inf, torch.inf).amin(-1, keepdim=True)
        wide = scores.masked_fill(scores < last - tolerance, -torch.inf)
        narrow = truncate(
            scores,
            top_k=params.top_k,
            top_p=max(edge, params.top_p - edge),
            min_p=min(1.0, params.min_p * (1 + edge)),
        )
        drawn = wide.gather(-1, tokens[:, None])[:, 0]
        least.append(drawn - wide.logsumexp(-1))
        most.append(drawn - narrow.logsumexp(-1))
    return torch.cat(least), torch.cat(most)
