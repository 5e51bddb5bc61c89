"""Batched sampling straight from a transformers causal language model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
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
from selfdistill.rollout.slab_cache import SlabCache

_log = logging.getLogger(__name__)


class TransformersEngine:
    """Samples from a transformers model: the one that is trained, or a copy that follows it.

    An own loop over the model, not `model.generate`: it reads a prompt once for its whole group,
    stops paying for finished rows and gives their places to the groups that wait, and draws from a
    generator of its own for each prompt, so that the same seed returns the same rollouts whatever
    else used random numbers in between.

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
        with evaluation_mode(self.model):
            rollouts = self._sample(prompts, group_size, params)
        return [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]

    def wait_for_group(self) -> None:
        """Nothing to do: no rank shares this engine."""

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
        self, prompts: Sequence[Sequence[int]], group_size: int, params: SamplingParams
    ) -> list[Rollout]:
        device = self.model.device
        # Every random number is drawn now, so that a row's depend on no other row.
        draws = torch.cat(
            [
                uniforms(params.seed + i, group_size, params.max_new_tokens)
                for i in range(len(prompts))
            ]
        ).to(device)
        eos = torch.tensor(self.eos_token_ids, device=device)
        tokens: list[list[int]] = [[] for _ in draws]
        logprobs: list[list[float]] = [[] for _ in draws]
        log_kept: list[list[float]] = [[] for _ in draws]
        batch = _Batch(self.model, most_rows=min(max(self.batch_size, group_size), len(draws)))
        entered = 0
        while entered < len(prompts) or len(batch.rows):
            groups = min(batch.places // group_size, len(prompts) - entered)
            if groups > 0:
                logits = batch.enter(prompts[entered : entered + groups], group_size, first=entered)
                entered += groups
            else:
                logits = batch.read(waits=entered < len(prompts))
            # The rows that have just entered are the last ones, and the only ones to choose for.
            rows = batch.rows[-len(logits) :]
            taken = batch.taken[-len(logits) :]
            choice = choose(logits, draws[rows, taken], params)
            if bool(choice.wrong.any()):
                row = int(rows[choice.wrong][0])
                raise NotANumberError(prompt=row // group_size, token=len(tokens[row]))
            chosen = choice.tokens[:, 0]
            for row, token, score in zip(
                rows.tolist(), chosen.tolist(), choice.logprobs.tolist(), strict=True
            ):
                tokens[row].append(token)
                logprobs[row].append(score)
            if choice.log_kept is not None:
                for row, share in zip(rows.tolist(), choice.log_kept.tolist(), strict=True):
                    log_kept[row].append(share)
            ended = torch.isin(chosen, eos) | (taken + 1 == params.max_new_tokens)
            if params.stop:
                ended |= self._stopped([tokens[row] for row in rows.tolist()], params.stop)
            batch.take(chosen, ended=ended)
        return [
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

    def _stopped(self, tokens: Sequence[list[int]], stop: Sequence[str]) -> Tensor:
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


class _Batch:
    """The rows that are sampled at once; all of them end in the cache's last slot.

    Args:
        model: in evaluation mode.
        most_rows: there are never more.

    Attributes:
        rows: [n] the number of each row's rollout, counted through all groups of the call.
        taken: [n] tokens that have been chosen for each row.
    """

    def __init__(self, model: PreTrainedModel, *, most_rows: int) -> None:
        self._model = model
        self._most_rows = most_rows
        self._slabs = SlabCache.supports(model.config)
        if not self._slabs:
            _log.info(
                "%s remembers more than keys and values of its layers: rollouts are sampled in "
                "batches that none joins, with a cache that is copied for every token",
                type(model).__name__,
            )
        self._cache: SlabCache | DynamicCache = (
            SlabCache(model.config) if self._slabs else DynamicCache(config=model.config)
        )
        self._width = 0
        none = torch.empty(0, dtype=torch.int64, device=model.device)
        self.rows, self.taken = none, none
        self._lengths, self._last = none, none  # tokens that have been read; the next to read

    @property
    def places(self) -> int:
        """Rows that may enter now."""
        return self._most_rows - len(self.rows) if self._slabs or not len(self.rows) else 0

    def enter(self, prompts: Sequence[Sequence[int]], group_size: int, *, first: int) -> Tensor:
        """Read prompts once, as rows of their groups; return the logits, [new rows, V].

        Args:
            prompts: token ids.
            group_size: rows of each.
            first: number of the first group.
        """
        device = self._model.device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = int(lengths.max())
        # Left padding, with a mask made from lengths: the pad id is never looked at.
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
        mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        cache = DynamicCache(config=self._model.config)
        logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        if isinstance(self._cache, SlabCache):
            self._cache.enter(cache, width=width, repeats=group_size, rows=self._most_rows)
            self._width = self._cache.width
        else:
            cache.batch_repeat_interleave(group_size)
            self._cache, self._width = cache, width
        new = torch.arange(len(prompts) * group_size, device=device)
        self.rows = torch.cat([self.rows, new + first * group_size])
        self.taken = torch.cat([self.taken, torch.zeros_like(new)])
        self._lengths = torch.cat([self._lengths, lengths.repeat_interleave(group_size)])
        return logits.repeat_interleave(group_size, 0)

    def read(self, *, waits: bool) -> Tensor:
        """Read the last token of every row; return the logits, [n, V].

        Args:
            waits: whether more rows will enter.
        """
        if isinstance(self._cache, SlabCache):
            rows = self._most_rows if waits else len(self.rows)
            self._cache.make_room(int(self._lengths.max()), rows=rows)
            self._width = self._cache.width
        positions = self._lengths[:, None]
        slots = torch.arange(self._width + 1, device=positions.device)
        logits = self._forward(
            self._last[:, None], (slots >= self._width - positions).long(), positions, self._cache
        )
        self._lengths = self._lengths + 1
        self._width += 1
        return logits

    def take(self, tokens: Tensor, *, ended: Tensor) -> None:
        """Give the last rows a token each; those that have ended leave.

        Args:
            tokens: [k] of the last k rows.
            ended: [k] bool.
        """
        before = len(self.rows) - len(tokens)
        self.taken[before:] += 1
        self._last = torch.cat([self._last[:before], tokens])
        if not bool(ended.any()):
            return
        stays = torch.cat([ended.new_ones(before), ~ended])
        # Rows from the end take the places that become free: the others need not move.
        count = int(stays.sum())
        order = torch.arange(count, device=stays.device)
        order[~stays[:count]] = stays[count:].nonzero()[:, 0] + count
        self.rows, self.taken, self._lengths, self._last = (
            state[order] for state in (self.rows, self.taken, self._lengths, self._last)
        )
        self._cache.batch_select_indices(order)

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: SlabCache | DynamicCache
    ) -> Tensor:
        """Return the logits after the last token of every row, [rows, V]."""
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits
