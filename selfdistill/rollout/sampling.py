"""The next token of every row: which one is drawn, and the log-prob that it was drawn with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfdistill.rollout.engine import SamplingParams


@dataclass(frozen=True)
class Choice:
    """What was drawn.

    Attributes:
        tokens: [rows, 1] int64.
        logprobs: [rows] float32, log-prob (nats) under the distribution that was sampled from.
        log_kept: [rows] float32, the log of what `top_k`, `top_p` and `min_p` left of the
            distribution at the sampling temperature; None where nothing is cut off.
        wrong: [rows] bool, rows whose logits are no numbers.
    """

    tokens: Tensor
    logprobs: Tensor
    log_kept: Tensor | None
    wrong: Tensor


def choose(logits: Tensor, uniform: Tensor, params: SamplingParams) -> Choice:
    """Draw the next token of every row.

    Args:
        logits: [rows, V], of any dtype.
        uniform: [rows] float64 in [0, 1), a random number for each row.
        params: temperature (0 takes the likeliest token) and what is cut off.
    """
    scores = torch.log_softmax(logits.float() / (params.temperature or 1.0), -1)
    # One logit that is no number leaves none in its row; -inf alone is a banned token.
    wrong = scores[:, 0].isnan()
    if params.temperature == 0:
        tokens = scores.argmax(-1, keepdim=True)
        return Choice(tokens, scores.gather(-1, tokens)[:, 0], None, wrong)
    if not params.truncates:
        tokens = _inverse_cdf(scores, uniform)
        return Choice(tokens, scores.gather(-1, tokens)[:, 0], None, wrong)
    kept = truncate(scores, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
    tokens = _inverse_cdf(kept, uniform)
    log_kept = kept.logsumexp(-1)
    return Choice(tokens, kept.gather(-1, tokens)[:, 0] - log_kept, log_kept, wrong)


def truncate(scores: Tensor, *, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Set the log-probs to -inf of what is never sampled; the others stay as they are.

    In the order of vLLM: first tokens less likely than `min_p` times the likeliest, then all but
    the `top_k` likeliest, then the least likely ones that `top_p` of what is left can do without.

    Args:
        scores: [..., V] log-probs.
        top_k: 0 keeps all; equally likely tokens stay together.
        top_p: 1 keeps all; the likeliest token always stays.
        min_p: 0 keeps all.
    """
    if min_p > 0:
        floor = scores.amax(-1, keepdim=True) + torch.log(scores.new_tensor(min_p))
        scores = scores.masked_fill(scores < floor, -torch.inf)
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k, -1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ordered, order = scores.sort(-1)
        # In float64, where the sum of a large vocabulary's tail is not lost.
        dropped = ordered.double().softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        scores = scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
    return scores


def uniforms(seed: int, group_size: int, length: int) -> Tensor:
    """Draw all random numbers of one prompt, [group_size, length] in [0, 1), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(group_size, length, generator=generator, dtype=torch.float64)


def _inverse_cdf(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token a row: [rows, V] log-probs and [rows] numbers in [0, 1) give [rows, 1]."""
    # In float64, where the sum of a large vocabulary's tail is not lost.
    cumulated = logprobs.double().exp().cumsum(-1)
    threshold = uniform[:, None] * cumulated[:, -1:]
    # Where there are no numbers the search ends behind the last token.
    return torch.searchsorted(cumulated, threshold, right=True).clamp(max=logprobs.shape[-1] - 1)
