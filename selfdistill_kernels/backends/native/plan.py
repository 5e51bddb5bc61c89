"""How a problem is cut into tiles that fit a workspace, and which strategy walks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfdistill_kernels.backends.native.caches import Caches, machine_caches

MEBIBYTE = 1 << 20
# Constants of CPU GEMMs, measured; the figures are in docs/decisions. They follow from flops a
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
# Columns of a 16-bit head that are widened to float32 at a time, where its products need that: what
# stays in a core's cache between the copy and the product, but enough columns for the product.
WIDENED_BYTES = 4 * MEBIBYTE
WIDENED_COLUMNS = range(256, 1025)
# Whole cache lines of logits for every part: 910 columns cost a seventh more than 1,024.
WIDENED_STEP = 64
# Of a given workspace that widened columns may take, one part in so many.
WIDENED_PART = 8
# Bytes beside the tile for each of its tokens and each element of a hidden state, with a teacher
# and without. With one, the logits take most: 16-bit rows of both models are gathered (2 + 2),
# joined (4) and widened (8), float32 rows gathered (4 + 4) and joined (8). Without one, the
# gradients do: dH in float32 and rounded (4 + 2), hidden states gathered and widened (2 + 4).
COPIED_WITH_TEACHER = 16
COPIED_ALONE = 12


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
        models: how many are scored, 2 with a teacher, 1 without.
        sum_bytes: float32 sums kept beside the tile for 16-bit inputs. `store`: dW, where there
            are several tiles. `recompute`: dH of all tokens and, where several tiles make a slab,
            the slab's dW.
        caches: those that slabs were cut for; None where no cache was asked (`store`).
        row_bytes: beside the tile for each of its tokens: copies of hidden states, a part of dH.
        widened: columns of a 16-bit head that are widened to float32 at a time, 0 where its
            products take it as it is.
        widened_hidden: elements of such a column.

    Not counted: what the statistics take, some 200 bytes a token, and what libraries pack.
    """

    strategy: Literal["store", "recompute"]
    rows: int
    columns: int
    models: int
    sum_bytes: int = 0
    caches: Caches | None = None
    row_bytes: int = 0
    widened: int = 0
    widened_hidden: int = 0

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
        need_hidden: bool = True,
        workspace: int = 0,
        on_gpu: bool = False,
        caches: Caches | None = None,
        row_bytes: int | None = None,
        widened_hidden: int = 0,
    ) -> TilePlan:
        """Choose tiles and strategy.

        Args:
            tokens: N; hidden: H; vocabulary: V; models: how many are scored.
            itemsize: bytes of an input element, 4 or 2.
            need_weight, need_hidden: whether dW and dH are wanted.
            workspace: bytes, 0 to choose.
            on_gpu: whether a GPU walks the tiles: the processor's caches mean nothing there.
            caches: None for this machine's.
            row_bytes: bytes that the products take for a token of a tile; None for those of
                hidden states through a head.
            widened_hidden: hidden size, summed over the heads whose columns are widened to float32;
                0 where the products take inputs as they are.

        Raises:
            ValueError: the workspace cannot hold the smallest tile and the sums beside it.
        """
        tokens = max(tokens, 1)
        copies = copied_bytes(hidden, models) if row_bytes is None else row_bytes
        widened = _widened_columns(widened_hidden, vocabulary, workspace)
        # Left to choose, the cap is one of tiles and sums: what lies beside them comes on top.
        row, beside = 4 * models * vocabulary, 0
        budget = max(min(AUTO_TOKENS * row, AUTO_CAP), row)
        if workspace:
            row, beside, budget = row + copies, 4 * widened * widened_hidden, workspace
        rows, sums = min(max(budget - beside, 0) // row, tokens), 0
        if need_weight and itemsize < 4 and rows < tokens:
            sums = 4 * vocabulary * hidden
            budget = workspace or min(budget + sums, AUTO_CAP)
            rows = (budget - beside - sums) // row
        elif need_weight and rows in SLOW_ROWS and rows < tokens:
            rows = SLOW_ROWS.start - 1
        few = FEW_TOKENS_16_BIT if sums else FEW_TOKENS
        if rows >= min(few, tokens) or (rows >= 1 and not need_weight):
            return cls(
                "store", rows, vocabulary, models, sums, None, copies, widened, widened_hidden
            )
        return cls.slabs(
            tokens=tokens,
            hidden=hidden,
            vocabulary=vocabulary,
            models=models,
            itemsize=itemsize,
            need_weight=need_weight,
            need_hidden=need_hidden,
            workspace=workspace,
            on_gpu=on_gpu,
            caches=caches,
            row_bytes=copies,
            widened_hidden=widened_hidden,
        )

    @classmethod
    def slabs(
        cls,
        *,
        tokens: int,
        hidden: int,
        vocabulary: int,
        models: int,
        itemsize: int,
        need_weight: bool = False,
        need_hidden: bool = False,
        workspace: int = 0,
        on_gpu: bool = False,
        caches: Caches | None = None,
        row_bytes: int | None = None,
        widened_hidden: int = 0,
        adds_weight: bool = False,
    ) -> TilePlan:
        """Cut into slabs of the vocabulary; arguments as in `choose`, and whether each slab of dW
        has parts from elsewhere.

        Raises:
            ValueError: the workspace cannot hold the smallest tile and the sums beside it.
        """
        # On a CPU a slab's columns follow from the caches; on a GPU the library cuts its products.
        tokens, widest = max(tokens, 1), min(SLAB_COLUMNS, vocabulary)
        rows = min(SLAB_TOKENS, tokens)
        if on_gpu:
            caches = None
        else:
            caches = caches or machine_caches()
            widest = min(_slab_columns(caches, rows, hidden, models, itemsize), widest)
        # What is held whatever the tile: sums of half-precision gradients, and widened columns.
        hidden_sums = 4 * tokens * hidden if itemsize < 4 and need_hidden else 0
        copies = copied_bytes(hidden, models) if row_bytes is None else row_bytes
        spare = max(workspace - hidden_sums, 1) if workspace else 0
        widened = _widened_columns(widened_hidden, vocabulary, spare)

        def plan(rows: int, columns: int) -> TilePlan:
            adds = itemsize < 4 and need_weight and (rows < tokens or adds_weight)
            sums = hidden_sums + (4 * columns * hidden if adds else 0)
            return cls(
                "recompute", rows, columns, models, sums, caches, copies, widened, widened_hidden
            )

        if not workspace:
            return plan(rows, widest)
        least = min(LEAST_COLUMNS, vocabulary)
        plans = []
        while rows:
            fixed = plan(rows, 0).bytes
            column_bytes = plan(rows, 1).bytes - fixed
            columns = min((workspace - fixed) // column_bytes, widest)
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
                f"{needed} bytes ({models} float32 rows of {least} logits, copies of their hidden "
                "states"
                + (f", and float32 sums of dH and of {least} rows of dW)" if hidden_sums else ")")
            )
        return max(fitting, key=lambda plan: plan.rows * plan.columns)

    @property
    def tile_elements(self) -> int:
        """Number of float32 logits in a tile."""
        return self.models * self.rows * self.columns

    @property
    def elements(self) -> int:
        """float32 values of the tile and the sums."""
        return self.tile_elements + self.sum_bytes // 4

    @property
    def bytes(self) -> int:
        """Size of the workspace: the tile, the sums and what the products take beside them."""
        return 4 * self.elements + self.rows * self.row_bytes + self.widened_bytes

    @property
    def widened_bytes(self) -> int:
        """Of the columns of the head that are float32 at a time."""
        return 4 * self.widened * self.widened_hidden

    def describe(self) -> str:
        """Return the plan in one line, for a person to read."""
        order = {
            "store": "one visit, 2 + 2 rho GEMMs",
            "recompute": "two sweeps over slabs, 2 + 4 rho GEMMs",
        }
        sums = f" with {self.sum_bytes / MEBIBYTE:.1f} of float32 sums" if self.sum_bytes else ""
        widened = f", {self.widened} columns of the head widened at a time" if self.widened else ""
        caches = f"; slabs for a {self.caches.describe()}" if self.caches else ""
        return (
            f"{self.strategy} ({order[self.strategy]}): tiles of {self.rows} tokens x "
            f"{self.columns} logits x {self.models} models, {self.bytes / MEBIBYTE:.1f} MiB"
            f"{sums}{widened}{caches}"
        )


def copied_bytes(hidden: int, models: int) -> int:
    """What the products of hidden states with a head take for a token of a tile."""
    return (COPIED_ALONE if models == 1 else COPIED_WITH_TEACHER) * hidden


def widened_bytes(hidden: int) -> int:
    """At most, of the columns of a head that are float32 at a time (of both heads where `hidden` is
    the sum of their hidden sizes)."""
    return 4 * hidden * _widened_columns(hidden, WIDENED_COLUMNS.stop, 0)


def _widened_columns(hidden: int, vocabulary: int, workspace: int) -> int:
    """Columns of the head that are widened at a time; `hidden` is 0 for a head that is not."""
    if not hidden:
        return 0
    columns = WIDENED_BYTES // (4 * hidden)
    columns -= columns % WIDENED_STEP
    columns = min(max(columns, WIDENED_COLUMNS.start), WIDENED_COLUMNS.stop - 1, vocabulary)
    if workspace:
        fitting = workspace // WIDENED_PART // (4 * hidden)
        fitting -= fitting % (WIDENED_STEP if fitting >= WIDENED_STEP else LEAST_COLUMNS)
        columns = min(columns, max(fitting, LEAST_COLUMNS))
    return columns


def _slab_columns(caches: Caches, rows: int, hidden: int, models: int, itemsize: int) -> int:
    """Columns of a slab, the widest whose traffic stays in the last-level cache.

    All tiles of a slab, and both products with the head, read its rows of the head [c, H] and of
    float32 dW [c, H]; a tile of logits [models r, c] is written by one product and read by two. The
    three together are compared with CACHE_SHARE of the cache.
    """
    column_bytes = hidden * (itemsize + 4) + 4 * models * rows
    fitting = int(CACHE_SHARE * caches.last) // column_bytes
    fitting -= fitting % LEAST_COLUMNS
    return max(min(fitting, SLAB_COLUMNS), NARROW_COLUMNS)
