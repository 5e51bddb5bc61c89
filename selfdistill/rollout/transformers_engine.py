"""Batched sampling straight from a transformers causal language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from selfdistill.model.parts import whole
from selfdistill.model.randomness import evaluation_mode
from selfdistill.rollout.engine import (
    NotANumberError,
    Rollout,
    SamplingParams,
    check_request,
    end_token_ids,
    make_rollout,
)


class TransformersEngine:
    """Samples from a transformers model: the one that is trained, or a copy that follows it.

    An own loop over the model, not `model.generate`: it reads a prompt once for its whole group,
    stops paying for finished rows, and draws from a generator of its own for each prompt, so that
    the same seed returns the same rollouts whatever else used random numbers in between.

    Args:
        model: a causal language model whose cache is a `DynamicCache`; used in evaluation mode.
        tokenizer: decodes the completions and knows the end-of-sequence token.
        batch_size: rows sampled at once (at least one group is); bounds the memory of the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 256,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eos_token_ids = end_token_ids(model.generation_config, tokenizer)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        """Sample `group_size` completions for each prompt (token ids).

        Returns:
            One list of rollouts per prompt, in order.

        Raises:
            ValueError: see `check_request`.
            NotANumberError: the model has no probabilities for a token.
        """
        check_request(
            prompts,
            group_size=group_size,
            params=params,
            max_length=getattr(self.model.config, "max_position_embeddings", None),
        )
        prompts_at_once = max(1, self.batch_size // group_size)
        groups: list[list[Rollout]] = []
        with evaluation_mode(self.model):
            for start in range(0, len(prompts), prompts_at_once):
                batch = prompts[start : start + prompts_at_once]
                groups.extend(self._sample(batch, group_size, params, first=start))
        return groups

    @torch.no_grad()
    def sync(self, model: nn.Module) -> None:
        """Take over the trained weights; nothing to do when the model is the engine's own."""
        if model is self.model:
            return
        own = dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                own[name].copy_(whole(parameter))

    @torch.no_grad()
    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        params: SamplingParams,
        *,
        first: int,
    ) -> list[list[Rollout]]:
        # Each prompt is read once, and its cache is then repeated for the rows of its group.
        device = self.model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = int(lengths.max())
        # Left padding, with a mask made from lengths: the pad id is never looked at.
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, positions, cache).repeat_interleave(group_size, 0)
        cache.batch_repeat_interleave(group_size)
        mask = mask.repeat_interleave(group_size, 0)
        position = lengths.repeat_interleave(group_size)[:, None]

        # Every random number is drawn now, so that a row's depend on no other row.
        draws = torch.cat(
            [
                _uniforms(params.seed + first + i, group_size, params.max_new_tokens)
                for i in range(len(prompts))
            ]
        ).to(device)
        eos = torch.tensor(self.eos_token_ids, device=device)
        rows = torch.arange(len(prompts) * group_size, device=device)
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        while True:
            scores = torch.log_softmax(logits.float() / (params.temperature or 1.0), -1)
            # One logit that is no number leaves none in its row; -inf alone is a banned token.
            if bool((wrong := scores[:, 0].isnan()).any()):
                row = int(rows[wrong][0])
                raise NotANumberError(prompt=first + row // group_size, token=len(tokens[row]))
            if params.temperature == 0:
                drawn = scores.argmax(-1, keepdim=True)
            else:
                drawn = _inverse_cdf(scores, draws[rows, len(tokens[rows[0]])])
            drawn_scores = scores.gather(-1, drawn)
            for row, token, score in zip(
                rows.tolist(), drawn[:, 0].tolist(), drawn_scores[:, 0].tolist(), strict=True
            ):
                tokens[row].append(token)
                logprobs[row].append(score)
            # Rows that have ended leave the batch and its cache.
            alive = (~torch.isin(drawn[:, 0], eos)).nonzero()[:, 0]
            if len(alive) == 0 or len(tokens[rows[alive[0]]]) == params.max_new_tokens:
                break
            if len(alive) < len(rows):
                rows, drawn, mask, position = (t[alive] for t in (rows, drawn, mask, position))
                cache.batch_select_indices(alive)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], -1)
            logits = self._forward(drawn, mask, position, cache)
            position = position + 1

        rollouts = [
            make_rollout(ids, scores, self.tokenizer, self.eos_token_ids)
            for ids, scores in zip(tokens, logprobs, strict=True)
        ]
        return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: DynamicCache,
    ) -> torch.Tensor:
        """Return the logits after the last token of every row, [rows, V]."""
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits


def _uniforms(seed: int, group_size: int, length: int) -> torch.Tensor:
    """Draw all random numbers of one prompt, [group_size, length] in [0, 1), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(group_size, length, generator=generator, dtype=torch.float64)


def _inverse_cdf(logprobs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw one token a row: [rows, V] log-probs and [rows] numbers in [0, 1) give [rows, 1]."""
    # In float64, where the sum of a large vocabulary's tail is not lost.
    cumulated = logprobs.double().exp().cumsum(-1)
    threshold = uniform[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, threshold, right=True)
