"""Rollout engines sample the student's own attempts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from selfdistill.errors import UserError


class EngineError(UserError):
    """An engine cannot start, or died; what it was doing has to be done again."""


class NotANumberError(EngineError):
    """The model has no probabilities for a token: its logits are NaN, or infinite.

    Attributes:
        prompt: the place of the prompt within the call.
        token: the place of the token within the completion, from 0.
    """

    def __init__(self, *, prompt: int, token: int, what: str = "") -> None:
        super().__init__(
            f"{what or f'prompt {prompt} of this call'}: the model's logits for token {token} of "
            "a rollout are NaN or infinite, expected numbers: weights or activations have "
            "overflowed. Is the model sound (sample from it elsewhere), is optimizer.learning_rate "
            "too high, does precision: float32 help? A training run keeps its last checkpoint"
        )
        self.prompt = prompt
        self.token = token


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    Prompt i of a call draws from a stream of its own, that of `seed + i`: what it gets depends
    neither on the other prompts nor on how a call is split over batches or ranks (except that
    another batch shape may round the probabilities differently).

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        max_new_tokens: length limit.
        seed: of this call.
        top_k, top_p, min_p: what is never sampled, see `selfdistill.rollout.sampling.truncate`.
        stop: texts that end a completion, which keeps them.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never sampled."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Rollout:
    """One sampled completion; token ids are kept and never re-tokenised.

    Attributes:
        token_ids: the completion, with the token that ended it when `finished`.
        logprobs: log-prob (nats) of each token under the distribution that was sampled from, with
            what `top_k`, `top_p` and `min_p` cut off (at temperature 1 if that is 0).
        text: the decoded completion; all its tokens, special ones too, but an end of sequence.
        finished: False when the length limit cut it off.
        log_kept: for each token the log of what was not cut off; None where nothing was, or where
            the engine does not say.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finished: bool
    log_kept: list[float] | None = None

    @property
    def policy_logprobs(self) -> list[float]:
        """Log-prob (nats) of each token at the sampling temperature, as if nothing was cut off.

        This is what the log-probs of a loss, which cuts nothing off, are compared with: the ratio
        of the two is 1 while the weights are those that sampled.
        """
        if self.log_kept is None:
            return self.logprobs
        return [own + kept for own, kept in zip(self.logprobs, self.log_kept, strict=True)]

    def first(self, tokens: int | None) -> Rollout:
        """Return the rollout with its first tokens only, and its whole text; None keeps all."""
        return replace(
            self,
            token_ids=self.token_ids[:tokens],
            logprobs=self.logprobs[:tokens],
            log_kept=None if self.log_kept is None else self.log_kept[:tokens],
        )


class RolloutEngine(Protocol):
    """Samples `group_size` completions for each prompt."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        """Return one list of `group_size` rollouts per prompt (prompts are token ids).

        The same weights, prompts and seed give the same rollouts.

        Raises:
            ValueError: see `check_request`.
            EngineError: the engine died.
        """
        ...

    def wait_for_group(self) -> None:
        """End a phase of sampling, after the last `generate` of this rank.

        Ranks that share an engine sample together, so each helps until none of its group asks any
        more. Nothing to do for engines that no rank shares.

        Raises:
            EngineError: the engine died.
        """
        ...

    def sync(self, model: nn.Module) -> None:
        """Sample from the weights that `model` has now; called after every change of them.

        Raises:
            EngineError: the engine cannot take these weights, or died.
        """
        ...


def sample(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    params: SamplingParams,
    names: Sequence[str],
) -> list[list[Rollout]]:
    """Return the engine's rollouts, none for no prompts.

    Args:
        engine, prompts, group_size, params: see `RolloutEngine.generate`.
        names: what to call each prompt when something is wrong with it.

    Raises:
        EngineError: whatever the engine raised; the message says what and how to go on.
    """
    if not prompts:
        return []
    with naming_failures(engine, names):
        return engine.generate(prompts, group_size=group_size, params=params)


@contextmanager
def naming_failures(engine: RolloutEngine, names: Sequence[str]) -> Iterator[None]:
    """Say what failed, and which prompt: `names` has one for each.

    Raises:
        EngineError: whatever was raised; the message says what and how to go on.
    """
    try:
        yield
    except NotANumberError as error:
        raise NotANumberError(
            prompt=error.prompt, token=error.token, what=names[error.prompt]
        ) from error
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(
            f"{type(engine).__name__} failed with {type(error).__name__}: {error}. A training run "
            "keeps its last checkpoint: mend the cause, then go on with --resume"
        ) from error


def check_request(
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    params: SamplingParams,
    max_length: int | None,
) -> None:
    """Refuse what no engine can sample.

    Args:
        prompts: token ids.
        group_size: completions per prompt.
        params: how they are drawn.
        max_length: most tokens of a prompt and its completion; None: no limit.

    Raises:
        ValueError: an empty prompt, a prompt that leaves no room for `max_new_tokens`, or sampling
            parameters outside their range.
    """
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if params.temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {params.temperature}")
    if params.top_k < 0 or not 0 < params.top_p <= 1 or not 0 <= params.min_p <= 1:
        raise ValueError(
            f"top_k, top_p and min_p must be at least 0, in (0, 1] and in [0, 1], got "
            f"{params.top_k}, {params.top_p} and {params.min_p}"
        )
    if params.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {params.max_new_tokens}")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{index}] is empty; a prompt needs at least one token")
        if max_length is not None and len(prompt) + params.max_new_tokens > max_length:
            raise ValueError(
                f"prompts[{index}] has {len(prompt)} tokens; with max_new_tokens="
                f"{params.max_new_tokens} it exceeds the model's {max_length} positions. "
                "Shorten the prompt or lower max_new_tokens."
            )


def end_token_ids(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """Return the tokens that end a completion: the generation config's and the tokenizer's.

    Raises:
        ValueError: neither names one.
    """
    configured = getattr(generation, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    known = {token for token in [*ids, tokenizer.eos_token_id] if token is not None}
    if not known:
        raise ValueError("the tokenizer and the generation config name no end-of-sequence token")
    return tuple(sorted(known))


def completion_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Decode what is judged, voted on or shown: every token counts, and nothing is tidied up.

    Tags of answers, steps and thoughts are special tokens of some vocabularies, so dropping special
    tokens would drop the answer.
    """
    if not token_ids:
        return ""  # some decoders expect at least one token
    text = tokenizer.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)


def stop_place(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], stop: Sequence[str]
) -> int | None:
    """Return how many tokens it takes to the end of the first stop string; None without one."""

    def stopped(tokens: int) -> bool:
        text = completion_text(tokenizer, token_ids[:tokens])
        return any(each in text for each in stop)

    # Not by the length of the text: the bytes of half a character decode to a character, too.
    if not stopped(len(token_ids)):
        return None
    return bisect_left(range(len(token_ids)), True, key=stopped)


def make_rollout(
    token_ids: list[int],
    logprobs: list[float],
    tokenizer: PreTrainedTokenizerBase,
    ends: Sequence[int],
    *,
    stop: Sequence[str] = (),
    log_kept: list[float] | None = None,
) -> Rollout:
    """Return a completion with its text, which leaves out nothing but an end-of-sequence token.

    Args:
        token_ids, logprobs, log_kept: see `Rollout`; what follows a stop string is cut off.
        tokenizer: decodes the tokens.
        ends: the tokens that end a completion.
        stop: the texts that end one.
    """
    finished = token_ids[-1] in ends
    read = token_ids[:-1] if finished else token_ids
    place = stop_place(tokenizer, read, stop) if stop else None
    if place is not None:
        read, finished = read[:place], True
    text = completion_text(tokenizer, read)
    return Rollout(token_ids, logprobs, text, finished, log_kept).first(place)
