"""Prefix-tree attention: many sequences with shared prefixes in one packed row, exactly.

Registered with transformers' `AttentionInterface` under `IMPLEMENTATION`. `enable_prefix_sharing`
sets it on a model once and for all: without a packed row it is plain `sdpa`, so generation and
evaluation are unchanged, and the replay of a checkpointed layer in the backward pass finds it still
in place. The tree travels as a model keyword, which reaches every layer, through PEFT and
checkpointed layers too; no key/value cache takes part.

    tree.py      the attention function, the tree, the keys lent from student to teacher
    model.py     one packed row through a model
    support.py   which models can share, asked before training starts
    backend.py   who computes the scores: loop, flash or flex, and why
"""

from selfdistill.model.attention.backend import (
    BACKENDS,
    Choice,
    Facts,
    UnavailableBackendError,
    choose_backend,
)
from selfdistill.model.attention.model import run_packed_row
from selfdistill.model.attention.support import (
    check_model_supports_prefix_sharing,
    enable_prefix_sharing,
)
from selfdistill.model.attention.tree import (
    IMPLEMENTATION,
    PrefixStash,
    PrefixTree,
    UnsupportedModelError,
    prefix_tree_attention,
)

__all__ = [
    "BACKENDS",
    "IMPLEMENTATION",
    "Choice",
    "Facts",
    "PrefixStash",
    "PrefixTree",
    "UnavailableBackendError",
    "UnsupportedModelError",
    "check_model_supports_prefix_sharing",
    "choose_backend",
    "enable_prefix_sharing",
    "prefix_tree_attention",
    "run_packed_row",
]
