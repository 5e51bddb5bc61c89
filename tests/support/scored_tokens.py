"""Scored tokens without a model: two rollouts of random hidden states, and a head."""

from __future__ import annotations

from typing import Any

import torch

from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import ScoredTokens


def random_tokens(hidden: int) -> ScoredTokens:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(20, hidden, generator=generator) for _ in range(2)]
    targets = torch.randint(0, 61, (20,), generator=generator)
    lengths = torch.tensor([14, 6])
    empty: Any = None
    return ScoredTokens(
        student_hidden=draw[0].requires_grad_(),
        teacher_hidden=draw[1],
        targets=targets,
        rollout_index=torch.repeat_interleave(lengths),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        statistics=empty,
        rollout_group=torch.tensor([0, 0]),
        old_logprobs=torch.rand(20, generator=generator) - 4.5,
        steps=torch.tensor([0] * 5 + [1] * 8 + [-1] + [0] * 3 + [1] * 3),
    )


def plain_head(weight: torch.Tensor) -> LMHead:
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=weight.requires_grad)
    return LMHead(layer)
