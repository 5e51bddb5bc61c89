"""What the engines of vLLM have in common, in this process and behind a server."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from selfdistill.rollout.engine import NotANumberError, Rollout


def rollout_seeds(prompts: int, *, group_size: int, seed: int) -> list[int]:
    """Return a seed for each rollout, for engines that draw each by a generator of its own.

    Those of prompt i come from the stream of `seed + i`, and no two streams share one.
    """
    streams = [random.Random(seed + place) for place in range(prompts)]
    return [stream.getrandbits(56) for stream in streams for _ in range(group_size)]


def refuse_no_numbers(rollouts: Sequence[Rollout], *, group_size: int) -> None:
    """Refuse what an engine drew where the model has no probabilities, which it may not notice.

    Raises:
        NotANumberError: a log-prob is not finite.
    """
    for place, rollout in enumerate(rollouts):
        for token, logprob in enumerate(rollout.logprobs):
            if not math.isfinite(logprob):
                raise NotANumberError(prompt=place // group_size, token=token)
