"""How a problem is cut into tiles that fit a workspace, and which strategy walks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfdistill_kernels.caches import Caches, machine_caches

MEBIBYTE = 1 << 20
# Constants of CPU GEMMs, measured; the figures are in docs/decisions.md. They follow from flops a
# byte of memory traffic, which no cache changes: a tile of logits may lie in memory.
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
# Slabs: wide enough for the GEMMs, narrower where the cache is small, but not below the least
# width that still pays, and a multiple of every vector width.
SLAB_TOKENS = 512
SLAB_COLUMNS = 8192
NARROW_COLUMNS = 1024
LEAST_COLUMNS = 16
# Of the last-level cache; the rest is for operands that stream through and for other processes.
CACHE_SHARE = 0.5


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
        sum_bytes: float32 sums kept beside the tile for 16-bit inputs. `store`: dW, where there
            are several tiles. `recompute`: dH of all tokens and, where several tiles make a slab,
            the slab's dW.
        caches: those that slabs were cut for; None where no cache was asked (`store`).

    Not counted: copies of the hidden states of a tile's tokens, and what the statistics take,
    some 200 bytes a token.
    """

    strategy: Literal["store", "recompute"]
    rows: int
    columns: int
    heads: int
    sum_bytes: int = 0
    caches: Caches | None = None

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
        need_hidden: bool = True,
        workspace: int = 0,
        on_gpu: bool = False,
        caches: Caches | None = None,
    ) -> TilePlan:
        """Choose tiles and strategy.

        Args:
            tokens: N; hidden: H; vocabulary: V; heads: models that are scored.
            itemsize: bytes of an input element, 4 or 2.
            need_weight, need_hidden: whether dW and dH are wanted.
            workspace: bytes, 0 to choose.
            on_gpu: whether a GPU walks the tiles: the processor's caches mean nothing there.
            caches: None for this machine's.

        Raises:
            ValueError: the workspace cannot hold the smallest tile and the sums beside it.
        """
        tokens = max(tokens, 1)
        row_bytes = 4 * heads * vocabulary
        budget = workspace or max(min(AUTO_TOKENS * row_bytes, AUTO_CAP), row_bytes)
        rows, sums = min(budget // row_bytes, tokens), 0
        if need_weight and itemsize < 4 and rows < tokens:
            sums = 4 * vocabulary * hidden
            budget = workspace or min(budget + sums, AUTO_CAP)
            rows = (budget - sums) // row_bytes
        elif need_weight and rows in SLOW_ROWS and rows < tokens:
            rows = SLOW_ROWS.start - 1
        few = FEW_TOKENS_16_BIT if sums else FEW_TOKENS
        if rows >= min(few, tokens) or (rows >= 1 and not need_weight):
            return cls("store", rows, vocabulary, heads, sums)
        return cls.slabs(
            tokens=tokens,
            hidden=hidden,
            vocabulary=vocabulary,
            heads=heads,
            itemsize=itemsize,
            need_weight=need_weight,
            need_hidden=need_hidden,
            workspace=workspace,
            on_gpu=on_gpu,
            caches=caches,
        )

    @classmethod
    def slabs(
        cls,
        *,
        tokens: int,
        hidden: int,
        vocabulary: int,
        heads: int,
        itemsize: int,
        need_weight: bool = False,
        need_hidden: bool = False,
        workspace: int = 0,
        on_gpu: bool = False,
        caches: Caches | None = None,
    ) -> TilePlan:
        """Cut into slabs of the vocabulary; arguments as in `choose`.

        Raises:
            ValueError: the workspace cannot hold the smallest tile and the sums beside it.
        """
        tokens, widest = max(tokens, 1), min(SLAB_COLUMNS, vocabulary)
        rows = min(SLAB_TOKENS, tokens)
        if on_gpu:
            caches = None
        else:
            caches = caches or machine_caches()
            widest = min(_slab_columns(caches, rows, hidden, heads, itemsize), widest)
        hidden_sums = 4 * tokens * hidden if itemsize < 4 and need_hidden else 0

        def plan(rows: int, columns: int) -> TilePlan:
            adds = itemsize < 4 and need_weight and rows < tokens
            slab_sums = 4 * columns * hidden if adds else 0
            return cls("recompute", rows, columns, heads, hidden_sums + slab_sums, caches)

        if not workspace:
            return plan(rows, widest)
        least = min(LEAST_COLUMNS, vocabulary)
        plans = []
        while rows:
            column_bytes = plan(rows, 1).bytes - hidden_sums
            columns = min((workspace - hidden_sums) // column_bytes, widest)
            whole = columns if columns == widest else columns - columns % least
            plans.append(plan(rows, max(whole, least)))
            # A GEMM wants rows and columns, the latter more.
            if columns >= min(8 * rows, widest):
                break
            rows //= 2
        fitting = [plan for plan in plans if plan.bytes <= workspace]
        if not fitting:
            needed = min(plan.bytes for plan in plans)
            raise ValueError(
                f"workspace: {workspace} bytes cannot hold one tile; this problem needs at least "
                f"{needed} bytes ({heads} float32 rows of {least} logits"
                + (f", and float32 sums of dH and of {least} rows of dW)" if hidden_sums else ")")
            )
        return max(fitting, key=lambda plan: plan.rows * plan.columns)

    @property
    def bytes(self) -> int:
        """Size of the workspace: the tile and the sums."""
        return 4 * self.heads * self.rows * self.columns + self.sum_bytes

    def describe(self) -> str:
        """One line for a person."""
        order = {
            "store": "one visit, 2 + 2 rho GEMMs",
            "recompute": "two sweeps over slabs, 2 + 4 rho GEMMs",
        }
        sums = f" with {self.sum_bytes / MEBIBYTE:.1f} of float32 sums" if self.sum_bytes else ""
        caches = f"; slabs for a {self.caches.describe()}" if self.caches else ""
        return (
            f"{self.strategy} ({order[self.strategy]}): tiles of {self.rows} tokens x "
            f"{self.columns} logits x {self.heads} models, {self.bytes / MEBIBYTE:.1f} MiB"
            f"{sums}{caches}"
        )


def _slab_columns(caches: Caches, rows: int, hidden: int, heads: int, itemsize: int) -> int:
    """Columns of a slab, the widest whose traffic stays in the last-level cache.

    All tiles of a slab, and both products with the head, read its rows of the head [c, H] and of
    float32 dW [c, H]; a tile of logits [heads r, c] is written by one product and read by two. The
    three together are held against CACHE_SHARE of the cache.
    """
    column_bytes = hidden * (itemsize + 4) + 4 * heads * rows
    fitting = int(CACHE_SHARE * caches.last) // column_bytes
    fitting -= fitting % LEAST_COLUMNS
    return max(min(fitting, SLAB_COLUMNS), NARROW_COLUMNS)
