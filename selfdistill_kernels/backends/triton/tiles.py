"""What the GEMM kernels share: the order of work items and the pair of score tiles.

Shapes: hidden states [n, H] of student and teacher (compact: only tokens that take part), head
[V, H]. Each tensor comes as a pointer or, with DESCRIPTORS, as a tensor descriptor whose loads are
asynchronous bulk copies (TMA). Accumulators are float32 and never leave the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from selfdistill_kernels.backends.triton.divergence import LOWEST, transform_logit


@triton.jit
def work_item(item, row_blocks, pieces, group_rows):
    """Row block and piece of the vocabulary of a work item.

    Items run through the row blocks of a group first, then through the vocabulary, then to the next
    group: programs that run together share a few tiles of the head, and the hidden states of one
    group stay in the L2 cache while the head streams past once.
    """
    per_group = group_rows * pieces
    group = item // per_group
    first = group * group_rows
    size = tl.minimum(row_blocks - first, group_rows)
    place = item - group * per_group
    return first + place % size, place // size


@triton.jit
def load_tile(
    source, first_row, first_column, rows, columns, stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A tile [BLOCK_ROWS, BLOCK_COLUMNS] of source [rows, columns], zero outside of it.

    EVEN: BLOCK_COLUMNS divides the columns.
    """
    if DESCRIPTORS:
        tile = source.load([first_row, first_column])
    else:
        row = first_row + tl.arange(0, BLOCK_ROWS)
        column = first_column + tl.arange(0, BLOCK_COLUMNS)
        pointers = source + (row[:, None].to(tl.int64) * stride + column[None, :])
        inside = row[:, None] < rows
        if not EVEN:
            inside = inside & (column[None, :] < columns)
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def score_tile(
    hidden, head, first_row, first_column, rows, vocabulary, size,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h W^T of one model, float32 [BLOCK_ROWS, BLOCK_COLUMNS]."""
    scores = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for k in range(0, size, BLOCK_HIDDEN):
        h = load_tile(
            hidden, first_row, k, rows, size, size, BLOCK_ROWS, BLOCK_HIDDEN, DESCRIPTORS, EVEN
        )
        w = load_tile(
            head, first_column, k, vocabulary, size, size, BLOCK_COLUMNS, BLOCK_HIDDEN,
            DESCRIPTORS, EVEN,
        )  # fmt: skip
        scores = tl.dot(h, w.T, scores, input_precision=PRECISION)
    return scores


@triton.jit
def score_tiles(
    student, teacher, head, teacher_head, first_row, first_column, rows, vocabulary, size,
    teacher_size,
    SHARED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """h W^T of both models side by side; a shared head tile is read once."""
    if SHARED:
        score_s = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        score_t = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for k in range(0, size, BLOCK_HIDDEN):
            h_s = load_tile(
                student, first_row, k, rows, size, size, BLOCK_ROWS, BLOCK_HIDDEN, DESCRIPTORS,
                EVEN,
            )  # fmt: skip
            h_t = load_tile(
                teacher, first_row, k, rows, size, size, BLOCK_ROWS, BLOCK_HIDDEN, DESCRIPTORS,
                EVEN,
            )  # fmt: skip
            w = load_tile(
                head, first_column, k, vocabulary, size, size, BLOCK_COLUMNS, BLOCK_HIDDEN,
                DESCRIPTORS, EVEN,
            )  # fmt: skip
            score_s = tl.dot(h_s, w.T, score_s, input_precision=PRECISION)
            score_t = tl.dot(h_t, w.T, score_t, input_precision=PRECISION)
    else:
        score_s = score_tile(
            student, head, first_row, first_column, rows, vocabulary, size, BLOCK_ROWS,
            BLOCK_COLUMNS, BLOCK_HIDDEN, DESCRIPTORS, EVEN, PRECISION,
        )  # fmt: skip
        score_t = score_tile(
            teacher, teacher_head, first_row, first_column, rows, vocabulary, teacher_size,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_HIDDEN, DESCRIPTORS, EVEN, PRECISION,
        )  # fmt: skip
    return score_s, score_t


@triton.jit
def _halves(tile):
    """Left and right half of a tile, without leaving the registers."""
    shape: tl.constexpr = tile.shape
    return tile.reshape(shape[0], 2, shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def parts(tile, PARTS: tl.constexpr):
    """The tile cut along its columns into 1, 2, 4 or 8.

    The statistics of a part need a dozen registers an element; cutting keeps the rest of the
    accumulators as the only thing that waits, so that nothing is spilled.
    """
    if PARTS == 1:
        return (tile,)
    elif PARTS == 2:
        return _halves(tile)
    elif PARTS == 4:
        left, right = _halves(tile)
        a, b = _halves(left)
        c, d = _halves(right)
        return a, b, c, d
    else:
        left, right = _halves(tile)
        a, b = _halves(left)
        c, d = _halves(right)
        a, e = _halves(a)
        b, f = _halves(b)
        c, g = _halves(c)
        d, h = _halves(d)
        return a, e, b, f, c, g, d, h


@triton.jit
def logits_of(
    scores, bias, columns, vocabulary, slope, rest, ceiling,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of scores, none below LOWEST; LOWEST beyond the vocabulary.

    SCALED: slope is not 1. MASKED: the vocabulary ends within a tile.
    """
    if HAS_BIAS:
        value = tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
        scores += value[None, :]
    if SCALED or CAPPED:
        scores = transform_logit(scores, slope, rest, ceiling, CAPPED)
    if MASKED:
        scores = tl.where((columns < vocabulary)[None, :], scores, LOWEST)
    return tl.where(scores < LOWEST, LOWEST, scores)
