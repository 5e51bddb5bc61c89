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
    stop_place,
)
from selfdistill.rollout.sampling import choose, uniforms


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
                uniforms(params.seed + first + i, group_size, params.max_new_tokens)
                for i in range(len(prompts))
            ]
        ).to(device)
        eos = torch.tensor(self.eos_token_ids, device=device)
        rows = torch.arange(len(prompts) * group_size, device=device)
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        log_kept: list[list[float]] = [[] for _ in rows]
        while True:
            choice = choose(logits, draws[rows, len(tokens[rows[0]])], params)
            if bool(choice.wrong.any()):
                row = int(rows[choice.wrong][0])
                raise NotANumberError(prompt=first + row // group_size, token=len(tokens[row]))
            drawn = choice.tokens
            for row, token, score in zip(
                rows.tolist(), drawn[:, 0].tolist(), choice.logprobs.tolist(), strict=True
            ):
                tokens[row].append(token)
                logprobs[row].append(score)
            if choice.log_kept is not None:
                for row, share in zip(rows.tolist(), choice.log_kept.tolist(), strict=True):
                    log_kept[row].append(share)
            # Rows that have ended leave the batch and its cache.
            ended = torch.isin(drawn[:, 0], eos)
            if params.stop:
                ended |= self._stopped([tokens[row] for row in rows.tolist()], params.stop)
            alive = (~ended).nonzero()[:, 0]
            if len(alive) == 0 or len(tokens[rows[alive[0]]]) == params.max_new_tokens:
                break
            if len(alive) < len(rows):
                rows, drawn, mask, position = (t[alive] for t in (rows, drawn, mask, position))
                cache.batch_select_indices(alive)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], -1)
            logits = self._forward(drawn, mask, position, cache)
            position = position + 1

        rollouts = [
            make_rollout(
                ids,
                scores,
                self.tokenizer,
                self.eos_token_ids,
                stop=params.stop,
                log_kept=kept if params.truncates else None,
            )
            for ids, scores, kept in zip(tokens, logprobs, log_kept, strict=True)
        ]
        return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]

    def _stopped(self, tokens: Sequence[list[int]], stop: Sequence[str]) -> torch.Tensor:
        """[rows] bool, the rows whose last tokens spell a stop string."""
        # A character has at most four tokens, of a byte each; the whole row says what the tail of a
        # tokenizer that decodes otherwise in the middle only seems to say.
        longest = 4 * max(map(len, stop)) + 4
        found = [
            stop_place(self.tokenizer, row[-longest:], stop) is not None
            and stop_place(self.tokenizer, row, stop) is not None
            for row in tokens
        ]
        return torch.tensor(found, device=self.model.device)

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
