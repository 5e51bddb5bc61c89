"""The memory of one sweep (one_sweep.py): how much it keeps of how many tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from selfdistill_kernels.backends.native.plan import AUTO_CAP, MEBIBYTE, TilePlan
from selfdistill_kernels.backends.native.rounding import SLAB
from selfdistill_kernels.backends.native.rows import LossTerms

# Candidates of a token: the kernels want the least of them, and a row that needs more than it has
# room for costs its exact gradient.
CAPACITIES = (8192, 4096)
# Of the workspace, what candidates may take: products want wide tiles beside them.
CANDIDATE_SHARE = 0.75
# Below so many tokens at a time their sweeps read the head too often.
LEAST_TOKENS = 64
# Below so many columns in a slab, their products cost more than a second sweep.
LEAST_COLUMNS = 256


def least_priority(relative_error: float, vocabulary: int, capacity: int) -> float:
    """What rows keep from their first slab on, log2 of the threshold for a token of weight 1.

    Rows of a language model whose threshold is lower are a few in a hundred, and have no room. To
    find that out by raising the floor would take most of the time of a sweep.
    """
    if vocabulary + 16 <= capacity:
        return -math.inf
    return -24.0 + 1.33 * math.log2(relative_error / 2e-3)


@dataclass(frozen=True)
class CandidatePlan:
    """One sweep over slabs of the vocabulary for so many tokens at a time.

    Attributes:
        tiles: slabs of strategy "recompute", with the sums of tokens that get an exact gradient.
        tokens: whose candidates are held together.
        capacity: candidates of a token.
        terms: of the loss, that may have a gradient.
        weight_bytes: float32 dW, for a 16-bit head that several groups of tokens add to.
    """

    tiles: TilePlan
    tokens: int
    capacity: int
    terms: LossTerms
    weight_bytes: int = 0

    @property
    def parts(self) -> int:
        """Numbers of a candidate: its column and the logit of each model that has a gradient."""
        return 3 if self.terms[0] else 2

    @property
    def slab(self) -> int:
        """Columns whose entries lie together: a part of each slab of logits."""
        return min(SLAB, self.tiles.columns)

    @property
    def elements(self) -> int:
        """float32 values of the workspace: tile and sums, candidates, dW."""
        held = self.tokens * self.parts * self.capacity
        return self.tiles.elements + held + self.weight_bytes // 4

    @property
    def bytes(self) -> int:
        """Size of the workspace and of what the products take beside it."""
        return self.tiles.bytes + 4 * self.elements - 4 * self.tiles.elements

    def describe(self) -> str:
        """Return the plan in one line, for a person to read."""
        return (
            "one sweep (2 GEMMs, 4 of a mixture, and sparse products): tiles of "
            f"{self.tiles.rows} tokens x {self.tiles.columns} logits x {self.tiles.models} models, "
            f"{self.capacity} candidates of {self.tokens} tokens, {self.bytes / MEBIBYTE:.1f} MiB"
        )

    @classmethod
    def choose(
        cls,
        *,
        tokens: int,
        hidden: int,
        vocabulary: int,
        models: int,
        itemsize: int,
        need_weight: bool,
        need_hidden: bool,
        workspace: int,
        terms: LossTerms,
        on_gpu: bool = False,
        row_bytes: int | None = None,
        widened_hidden: int = 0,
    ) -> CandidatePlan | None:
        """Choose the sizes; arguments as in `TilePlan.choose`. None where the workspace has no room
        for them."""
        parts, budget = (3 if terms[0] else 2), workspace or AUTO_CAP
        whole = -(-(vocabulary + 16) // 16) * 16
        for capacity in CAPACITIES:
            # A row that is smaller has room for all of its entries; the kernels want the least.
            capacity = min(capacity, max(whole, CAPACITIES[-1]))
            token_bytes = 4 * parts * capacity
            fitting = min(int(CANDIDATE_SHARE * budget) // token_bytes, tokens)
            if fitting < tokens and capacity > CAPACITIES[-1]:
                continue
            is_summed = fitting < tokens and need_weight and itemsize < 4
            weight_bytes = 4 * vocabulary * hidden if is_summed else 0
            rest = budget - fitting * token_bytes - weight_bytes
            if fitting < min(LEAST_TOKENS, tokens) or rest <= 0:
                return None
            try:
                tiles = TilePlan.slabs(
                    tokens=fitting,
                    hidden=hidden,
                    vocabulary=vocabulary,
                    models=models,
                    itemsize=itemsize,
                    need_weight=need_weight,
                    need_hidden=need_hidden,
                    workspace=rest,
                    on_gpu=on_gpu,
                    row_bytes=row_bytes,
                    widened_hidden=widened_hidden,
                    adds_weight=True,
                )
            except ValueError:
                return None
            if tiles.columns > SLAB and tiles.columns < vocabulary:
                tiles = replace(tiles, columns=tiles.columns // SLAB * SLAB)
            if tiles.columns < min(LEAST_COLUMNS, vocabulary):
                return None
            return cls(tiles, fitting, capacity, terms, weight_bytes)
        return None
