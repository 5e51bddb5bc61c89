"""How a problem is cut into tiles that fit a workspace, and which strategy walks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MEBIBYTE = 1 << 20
# Constants of CPU GEMMs, measured; the figures are in docs/decisions.md.
# A tile of this many tokens is where the head is read seldom enough for the GEMMs to run at full
# speed; the cap keeps large vocabularies from taking it all.
AUTO_TOKENS = 512
AUTO_CAP = 256 * MEBIBYTE
# Below this many tokens a tile, reading and writing all of dW for each tile costs more than a
# second sweep over slabs of the vocabulary.
FEW_TOKENS = 32
# The same for 16-bit inputs: their GEMMs are cheap beside a float32 dW that is read and written.
FEW_TOKENS_16_BIT = 128
# The float32 GEMM of dW is slower a row with 48 to about 95 rows than with 47.
SLOW_ROWS = range(48, 96)
# Slabs: wide enough for the GEMMs, and a multiple of every vector width.
SLAB_TOKENS = 512
SLAB_COLUMNS = 8192
LEAST_COLUMNS = 16


@dataclass(frozen=True)
class TilePlan:
    """Tiles of float32 logits and the order in which they are visited.

    Attributes:
        strategy: "store": a tile spans the vocabulary, and statistics, mask and gradient are made
            in one visit (2 + 2 rho GEMMs). "recompute": slabs of the vocabulary outermost, one
            sweep for statistics and one for gradients (2 + 4 rho GEMMs); each slab of dW is
            written once.
        rows: tokens in a tile.
        columns: vocabulary entries in a tile.
        heads: 2 with a teacher, 1 without.
        accumulator_bytes: float32 dW kept beside the tile (`store` with 16-bit inputs and several
            tiles).
    """

    strategy: Literal["store", "recompute"]
    rows: int
    columns: int
    heads: int
    accumulator_bytes: int = 0

    @classmethod
    def choose(
        cls,
        *,
        tokens: int,
        hidden: int,
        vocabulary: int,
        heads: int,
        itemsize: int,
        need_weight: bool,
        workspace: int = 0,
    ) -> TilePlan:
        """Choose tiles and strategy.

        Args:
            tokens: N; hidden: H; vocabulary: V; heads: models that are scored.
            itemsize: bytes of an input element, 4 or 2.
            need_weight: whether dW is wanted.
            workspace: bytes, 0 to choose.

        Raises:
            ValueError: the workspace cannot hold the smallest tile.
        """
        tokens = max(tokens, 1)
        row_bytes = 4 * heads * vocabulary
        budget = workspace or max(min(AUTO_TOKENS * row_bytes, AUTO_CAP), row_bytes)
        rows, accumulator = min(budget // row_bytes, tokens), 0
        if need_weight and itemsize < 4 and rows < tokens:
            accumulator = 4 * vocabulary * hidden
            budget = workspace or min(budget + accumulator, AUTO_CAP)
            rows = (budget - accumulator) // row_bytes
        elif need_weight and rows in SLOW_ROWS and rows < tokens:
            rows = SLOW_ROWS.start - 1
        few = FEW_TOKENS_16_BIT if accumulator else FEW_TOKENS
        if rows >= min(few, tokens) or (rows >= 1 and not need_weight):
            return cls("store", rows, vocabulary, heads, accumulator)
        return cls.slabs(
            tokens=tokens, vocabulary=vocabulary, heads=heads, workspace=workspace or AUTO_CAP
        )

    @classmethod
    def slabs(cls, *, tokens: int, vocabulary: int, heads: int, workspace: int = 0) -> TilePlan:
        """Cut into slabs of the vocabulary.

        Raises:
            ValueError: the workspace cannot hold the smallest tile.
        """
        tokens = max(tokens, 1)
        columns = min(SLAB_COLUMNS, vocabulary)
        rows = min(SLAB_TOKENS, tokens)
        if workspace:
            entries = workspace // (4 * heads)
            least = min(LEAST_COLUMNS, vocabulary)
            if entries < least:
                raise ValueError(
                    f"workspace: {workspace} bytes cannot hold one tile; this problem needs at "
                    f"least {4 * heads * least} bytes ({heads} float32 rows of {least} logits)"
                )
            # Shrink rows and columns alike: a GEMM wants both.
            while rows * columns > entries:
                if columns >= max(16 * rows, 2 * least) or rows == 1:
                    columns = max(least, columns // 2)
                else:
                    rows = max(1, rows // 2)
        return cls("recompute", rows, columns, heads)

    @property
    def bytes(self) -> int:
        """Size of the workspace."""
        return 4 * self.heads * self.rows * self.columns + self.accumulator_bytes

    def describe(self) -> str:
        """One line for a person."""
        order = {
            "store": "one visit, 2 + 2 rho GEMMs",
            "recompute": "two sweeps over slabs, 2 + 4 rho GEMMs",
        }
        return (
            f"{self.strategy} ({order[self.strategy]}): tiles of {self.rows} tokens x "
            f"{self.columns} logits x {self.heads} models, {self.bytes / MEBIBYTE:.1f} MiB"
        )
