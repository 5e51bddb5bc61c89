"""Ranks that share an engine of vLLM, each of them with a part of the model.

vLLM wants the same requests in the same calls from all ranks of a group. But each rank samples
problems of its own, and one has more of them than another, or none. So a group works in rounds: in
each, every rank says what it asks, or that it asks nothing any more; all of them draw all of it,
and each keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from selfdistill.config import ConfigError

T = TypeVar("T")

_SETTING = "rollout.engine.tensor_parallel_size"


class EngineGroup:
    """The ranks that share an engine with this one: as many as `size`, one after the other.

    All ranks of the run make theirs together.

    Args:
        size: ranks of a group, which divides the number of ranks.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # What is exchanged lies in the machine's memory, wherever the models are.
        self._group, _ = dist.new_subgroups(size, backend="gloo")

    def exchange(self, own: Sequence[T] | None) -> tuple[list[T], slice]:
        """Take part in a round.

        Args:
            own: what this rank asks; None: nothing more in this phase.

        Returns:
            What all ranks of the group ask, in their order, and which of it is this rank's.
        """
        parts: list[Sequence[T] | None] = [None] * self._size
        dist.all_gather_object(parts, own, group=self._group)
        before = sum(len(part or ()) for part in parts[: dist.get_rank(self._group)])
        asked = [request for part in parts for request in part or ()]
        return asked, slice(before, before + len(own or ()))


def check_groups(size: int, *, ranks: int, model_config: Any) -> None:
    """Refuse groups that the ranks or the model cannot be divided into.

    Args:
        size: ranks of a group.
        ranks: of the run.
        model_config: of the model, as transformers reads it.

    Raises:
        ConfigError: the ranks are not a multiple of `size`, or a part of the model is not.
    """
    if ranks % size:
        raise ConfigError(
            f"{_SETTING}: groups of {size} ranks share an engine, and this run has {ranks}: start "
            f"a multiple of {size} (torchrun --nproc-per-node), or set it to 1"
        )
    check_heads(size, model_config)


def check_heads(size: int, model_config: Any) -> None:
    """Refuse a model that vLLM cannot divide.

    Args:
        size: ranks of a group.
        model_config: of the model, as transformers reads it.

    Raises:
        ConfigError: `size` does not divide the attention heads, the key/value heads (unless it is
            a multiple of theirs: then each is held several times) or the width of the MLP.
    """
    text = model_config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(text, name, None)
        if not isinstance(count, int):  # this family has none, or one for each layer
            continue
        repeats = name == "num_key_value_heads" and size % count == 0
        if count % size and not repeats:
            raise ConfigError(
                f"{_SETTING}: vLLM divides the model by {size}, and its {name} is {count}: set it "
                f"to a number that divides {count}, such as 1"
            )
