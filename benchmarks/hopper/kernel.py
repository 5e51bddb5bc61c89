"""The first sweep over the vocabulary by a producer and two consumers, in Triton's Gluon.

One warp copies (TMA), two warp groups multiply (WGMMA) and keep the statistics: what
backends/triton/sweep.py computes, by the same functions. Each consumer has 64 rows of both models
against the same 128 entries, so a tile of the head is read once for all of them.

A ring of STAGES buffers lies between them. `full` of a stage: its copies have landed; `empty`: both
consumers are done with it. Consumers may be up to STAGES steps apart, so one of them still
multiplies while the other sums. In a cluster each program has its own hidden states, and the first
one sends each tile of the head to all: it waits for the consumers of the whole cluster (`unread`).
"""

from __future__ import annotations

import inspect

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from selfdistill_kernels.backends.triton.columns import (
    CURVATURE,
    EXCESS,
    MOMENT,
    STATE,
    STUDENT_MAX,
    STUDENT_MOMENT,
    STUDENT_SUM,
    STUDENT_TARGET,
    TEACHER_MAX,
    TEACHER_MOMENT,
    TEACHER_SUM,
    TEACHER_TARGET,
)
from selfdistill_kernels.backends.triton.divergence import (
    LOWEST,
    LOWEST_MAXIMUM,
    moved,
    pair_sums,
    student_sums,
)
from selfdistill_kernels.backends.triton.tiles import parts, work_item

CONSUMERS = gl.constexpr(2)
# Of one consumer: the shape of WGMMA's widest instruction whose accumulators of two models leave
# registers for the sums.
BLOCK_ROWS = gl.constexpr(64)
BLOCK_COLUMNS = gl.constexpr(128)
BLOCK_HIDDEN = gl.constexpr(64)
# A row of the accumulators lies in four lanes, two neighbouring entries of every eight in each.
LANES = gl.constexpr(4)
PAIR = gl.constexpr(2)
# Whole tiles of sums would not fit the registers beside the accumulators; eighths do.
PARTS = gl.constexpr(8)
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)

# Triton renamed it after 3.7, which was the first that copies to a whole cluster.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
MULTICAST = gl.constexpr("multicast" in inspect.signature(async_load).parameters)


@gluon.jit
def _by_lane(tile):
    """[rows, columns] as [rows, columns / 8, 4, 2]: each lane's entries along axes 1 and 3."""
    return tile.reshape(tile.shape[0], tile.shape[1] // (LANES * PAIR), LANES, PAIR)


@gluon.jit
def _of_entries(of_lanes):
    """[rows, 4] to broadcast against _by_lane."""
    return of_lanes.expand_dims(1).expand_dims(3)


@gluon.jit
def _after(maximum, total):
    """The maximum, once the total is known: total is finite, or a NaN that is here to stay.

    The compiler would otherwise begin all parts at once, and spill.
    """
    return _of_entries(gl.fma(total, gl.zeros_like(total), maximum))


@gluon.jit
def _copy_head(head, first_column, k, ready, buffer, CLUSTER: gl.constexpr):
    if CLUSTER > 1:
        async_load(head, [first_column, k], ready, buffer, multicast=True)
    else:
        async_load(head, [first_column, k], ready, buffer)


@gluon.jit
def produce(
    student, teacher, head, rings, count, vocabulary, size, pieces, piece_tiles, group_rows,
    STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Copy each step's five tiles into the next buffer of the ring, once it is empty."""
    students, teachers, heads, full, empty, unread = rings
    ROWS: gl.constexpr = CLUSTER * BLOCK_ROWS
    STEP_BYTES: gl.constexpr = 2 * BLOCK_HIDDEN * (2 * CONSUMERS * BLOCK_ROWS + BLOCK_COLUMNS)
    row_blocks = gl.cdiv(gl.load(count).to(gl.int32), CONSUMERS * ROWS)
    tiles = gl.cdiv(vocabulary, BLOCK_COLUMNS)
    step = 0
    for item in range(gl.program_id(0), row_blocks * pieces, gl.num_programs(0)):
        row_block, piece = work_item(item, row_blocks, pieces, group_rows)
        first_row = row_block * (CONSUMERS * ROWS)
        first_tile = piece * piece_tiles
        for tile in range(first_tile, gl.minimum(first_tile + piece_tiles, tiles)):
            for k in range(0, size, BLOCK_HIDDEN):
                stage = step % STAGES
                # The ring begins empty: the phase before the first counts as over.
                phase = (step // STAGES & 1) ^ 1
                mbarrier.wait(empty.index(stage), phase)
                ready = full.index(stage)
                mbarrier.expect(ready, STEP_BYTES)
                for consumer in gl.static_range(CONSUMERS):
                    row = first_row + consumer * ROWS
                    buffer = stage * CONSUMERS + consumer
                    async_load(student, [row, k], ready, students.index(buffer))
                    async_load(teacher, [row, k], ready, teachers.index(buffer))
                if CLUSTER > 1:
                    mbarrier.wait(unread.index(stage), phase)
                _copy_head(head, tile * BLOCK_COLUMNS, k, ready, heads.index(stage), CLUSTER)
                step += 1


@gluon.jit
def _release(empty, unread, stage, reading, CLUSTER: gl.constexpr):
    mbarrier.arrive(empty.index(stage), pred=reading)
    if CLUSTER > 1:
        mbarrier.arrive(unread.index(stage), pred=reading)


@gluon.jit
def _scores(
    rings, step, size, CONSUMER: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """h W^T of both models, float32 [CLUSTER * BLOCK_ROWS, BLOCK_COLUMNS], and the next step."""
    students, teachers, heads, full, empty, unread = rings
    score_s = gl.zeros((CLUSTER * BLOCK_ROWS, BLOCK_COLUMNS), gl.float32, LAYOUT)
    score_t = gl.zeros((CLUSTER * BLOCK_ROWS, BLOCK_COLUMNS), gl.float32, LAYOUT)
    for k in range(0, size, BLOCK_HIDDEN):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        h_s = students.index(stage * CONSUMERS + CONSUMER)
        h_t = teachers.index(stage * CONSUMERS + CONSUMER)
        w = heads.index(stage).permute((1, 0))
        score_s = warpgroup_mma(h_s, w, score_s, use_acc=k > 0, is_async=True)
        score_t = warpgroup_mma(h_t, w, score_t, use_acc=k > 0, is_async=True)
        # Two products are in flight, those of this step: the buffer of the step before is read.
        score_s, score_t = warpgroup_mma_wait(2, deps=(score_s, score_t))
        _release(empty, unread, (step + STAGES - 1) % STAGES, k > 0, CLUSTER)
        step += 1
    score_s, score_t = warpgroup_mma_wait(0, deps=(score_s, score_t))
    _release(empty, unread, (step + STAGES - 1) % STAGES, size > 0, CLUSTER)
    return score_s, score_t, step


@gluon.jit
def _logits(scores, entries, room, MASKED: gl.constexpr):
    """Logits by lane, none below LOWEST; `room` entries of a lane are left of the vocabulary."""
    z = _by_lane(scores)
    if MASKED:
        z = gl.where(entries < room, z, LOWEST)
    return gl.where(z < LOWEST, LOWEST, z)


@gluon.jit
def _highest(highest, z):
    """[rows, 4] the maximum of each lane, so far and with the logits z of a part."""
    return gl.maximum(highest, gl.max(gl.max(z, 3), 1))


@gluon.jit
def _lane_sum(of_pairs):
    """[rows, 4] from sums over axis 3, [rows, columns / 8, 4]."""
    return gl.sum(of_pairs, 1)


@gluon.jit
def consume(
    rings, targets, tokens, count, partial, capacity, vocabulary, size, pieces, piece_tiles,
    group_rows,
    CONSUMER: gl.constexpr, DIVERGENCE: gl.constexpr, HAS_TARGETS: gl.constexpr,
    MASKED: gl.constexpr, STAGES: gl.constexpr, CLUSTER: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Multiply, and keep online sums: each lane its own, joined once an item.

    So no tile costs an exchange between lanes, which `tl.sum` over a row of a tile would.
    """
    ROWS: gl.constexpr = CLUSTER * BLOCK_ROWS
    WIDTH: gl.constexpr = BLOCK_COLUMNS // PARTS
    shape = parts(gl.zeros((ROWS, BLOCK_COLUMNS), gl.float32, LAYOUT), PARTS)[0]
    ENTRIES: gl.constexpr = _by_lane(shape).type.layout
    EIGHTS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, ENTRIES)))
    PAIRS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, ENTRIES)))
    STATES: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, ENTRIES))
    # What is left of an entry's number without part, tile and lane: a constant of each register.
    eights = gl.arange(0, WIDTH // (LANES * PAIR), EIGHTS) * (LANES * PAIR)
    pairs = gl.arange(0, PAIR, PAIRS)
    entries = eights.expand_dims(0).expand_dims(2).expand_dims(3) + pairs.expand_dims(
        0
    ).expand_dims(1).expand_dims(2)
    lane = (gl.arange(0, LANES, gl.SliceLayout(0, STATES)) * PAIR).expand_dims(0)

    rows = gl.load(count).to(gl.int32)
    row_blocks = gl.cdiv(rows, CONSUMERS * ROWS)
    tiles = gl.cdiv(vocabulary, BLOCK_COLUMNS)
    step = 0
    for item in range(gl.program_id(0), row_blocks * pieces, gl.num_programs(0)):
        row_block, piece = work_item(item, row_blocks, pieces, group_rows)
        first_row = (row_block * CONSUMERS + CONSUMER) * ROWS
        row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, STATES))
        inside = row < rows
        if HAS_TARGETS:
            token = gl.load(tokens + row, mask=inside, other=0)
            target = gl.load(targets + token, mask=inside, other=-1).to(gl.int32)

        max_s = gl.full((ROWS, LANES), LOWEST_MAXIMUM, gl.float32, STATES)
        max_t = max_s
        sum_s = gl.zeros((ROWS, LANES), gl.float32, STATES)
        sum_t = sum_s
        excess = sum_s
        moment = sum_s
        curvature = sum_s
        moment_s = sum_s
        moment_t = sum_s
        target_s = sum_s
        target_t = sum_s
        first_tile = piece * piece_tiles
        for tile in range(first_tile, gl.minimum(first_tile + piece_tiles, tiles)):
            score_s, score_t, step = _scores(rings, step, size, CONSUMER, STAGES, CLUSTER, LAYOUT)
            parts_s = parts(score_s, PARTS)
            parts_t = parts(score_t, PARTS)
            room = vocabulary - tile * BLOCK_COLUMNS - lane
            new_s = max_s
            new_t = max_t
            for part in gl.static_range(PARTS):
                left = _of_entries(room - part * WIDTH)
                z_s = _logits(parts_s[part], entries, left, MASKED)
                z_t = _logits(parts_t[part], entries, left, MASKED)
                new_s = _highest(new_s, z_s)
                new_t = _highest(new_t, z_t)
                if HAS_TARGETS:
                    place = target.expand_dims(1) - tile * BLOCK_COLUMNS - lane - part * WIDTH
                    hit = entries == _of_entries(place)
                    target_s += _lane_sum(gl.sum(gl.where(hit, z_s, 0.0), 3))
                    target_t += _lane_sum(gl.sum(gl.where(hit, z_t, 0.0), 3))
            sum_s, sum_t, excess, moment, curvature, moment_s, moment_t = moved(
                max_s - new_s, max_t - new_t, sum_s, sum_t, excess, moment, curvature, moment_s,
                moment_t, DIVERGENCE,
            )  # fmt: skip
            max_s = new_s
            max_t = new_t
            for part in gl.static_range(PARTS):
                left = _of_entries(room - part * WIDTH)
                z_s = _logits(parts_s[part], entries, left, MASKED)
                z_t = _logits(parts_t[part], entries, left, MASKED)
                centre_s = _after(max_s, sum_s)
                centre_t = _after(max_t, sum_t)
                add_s, add_moment_s = student_sums(z_s, centre_s, 3)
                add_t, add_moment_t = student_sums(z_t, centre_t, 3)
                add_excess, add_moment, add_curvature = pair_sums(
                    z_s, z_t, centre_s, centre_t, DIVERGENCE, 3
                )
                sum_s += _lane_sum(add_s)
                sum_t += _lane_sum(add_t)
                excess += _lane_sum(add_excess)
                moment += _lane_sum(add_moment)
                curvature += _lane_sum(add_curvature)
                moment_s += _lane_sum(add_moment_s)
                moment_t += _lane_sum(add_moment_t)

        new_s = gl.max(max_s, 1)
        new_t = gl.max(max_t, 1)
        sum_s, sum_t, excess, moment, curvature, moment_s, moment_t = moved(
            max_s - new_s.expand_dims(1), max_t - new_t.expand_dims(1), sum_s, sum_t, excess,
            moment, curvature, moment_s, moment_t, DIVERGENCE,
        )  # fmt: skip
        to = partial + piece.to(gl.int64) * STATE * capacity + row
        gl.store(to + STUDENT_MAX * capacity, new_s, mask=inside)
        gl.store(to + TEACHER_MAX * capacity, new_t, mask=inside)
        gl.store(to + STUDENT_SUM * capacity, gl.sum(sum_s, 1), mask=inside)
        gl.store(to + TEACHER_SUM * capacity, gl.sum(sum_t, 1), mask=inside)
        gl.store(to + EXCESS * capacity, gl.sum(excess, 1), mask=inside)
        gl.store(to + MOMENT * capacity, gl.sum(moment, 1), mask=inside)
        gl.store(to + CURVATURE * capacity, gl.sum(curvature, 1), mask=inside)
        gl.store(to + STUDENT_MOMENT * capacity, gl.sum(moment_s, 1), mask=inside)
        gl.store(to + TEACHER_MOMENT * capacity, gl.sum(moment_t, 1), mask=inside)
        gl.store(to + STUDENT_TARGET * capacity, gl.sum(target_s, 1), mask=inside)
        gl.store(to + TEACHER_TARGET * capacity, gl.sum(target_t, 1), mask=inside)


# Sizes that no address depends on: one compilation serves all of them.
@gluon.jit(do_not_specialize=["capacity", "vocabulary", "pieces", "piece_tiles", "group_rows"])
def specialised_sweep_kernel(
    student, teacher, head, targets, tokens, count, partial, capacity, vocabulary, size, pieces,
    piece_tiles, group_rows,
    DIVERGENCE: gl.constexpr, HAS_TARGETS: gl.constexpr, MASKED: gl.constexpr,
    STAGES: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Persistent clusters; a work item is CLUSTER * 128 rows and `piece_tiles` tiles of entries.

    student, teacher: descriptors of [capacity, size] bfloat16 for blocks of CLUSTER * 64 x 64, the
    programs of a cluster one below the other; head: of [vocabulary, size] for 128 x 64, all of it
    in each program. targets [N] int64, tokens [capacity] int64, count [1] int64; size is a multiple
    of 64. Writes partial [pieces, 11, capacity] float32 as sweep_kernel does.
    """
    hidden_shape: gl.constexpr = [STAGES * CONSUMERS, CLUSTER * BLOCK_ROWS, BLOCK_HIDDEN]
    head_shape: gl.constexpr = [STAGES, BLOCK_COLUMNS, BLOCK_HIDDEN]
    students = gl.allocate_shared_memory(student.dtype, hidden_shape, student.layout)
    teachers = gl.allocate_shared_memory(teacher.dtype, hidden_shape, teacher.layout)
    heads = gl.allocate_shared_memory(head.dtype, head_shape, head.layout)
    # Without a cluster the layouts are written without one: Triton 3.6 knows no other.
    OWN: gl.constexpr = mbarrier.MBarrierLayout([[1]]) if CLUSTER > 1 else mbarrier.MBarrierLayout()
    WHOLE: gl.constexpr = mbarrier.MBarrierLayout([[0]]) if CLUSTER > 1 else OWN
    LAYOUT: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_COLUMNS, 16], [[1, 0]])
        if CLUSTER > 1
        else gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_COLUMNS, 16])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, CLUSTER], OWN)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, CLUSTER], OWN)
    unread = gl.allocate_shared_memory(gl.int64, [STAGES, 1], WHOLE)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
        mbarrier.init(unread.index(stage), count=CONSUMERS)
    fence_async_shared()
    rings = (students, teachers, heads, full, empty, unread)
    gl.warp_specialize(
        [
            (consume, (rings, targets, tokens, count, partial, capacity, vocabulary, size, pieces,
                       piece_tiles, group_rows, 0, DIVERGENCE, HAS_TARGETS, MASKED, STAGES,
                       CLUSTER, LAYOUT)),
            (consume, (rings, targets, tokens, count, partial, capacity, vocabulary, size, pieces,
                       piece_tiles, group_rows, 1, DIVERGENCE, HAS_TARGETS, MASKED, STAGES,
                       CLUSTER, LAYOUT)),
            (produce, (student, teacher, head, rings, count, vocabulary, size, pieces,
                       piece_tiles, group_rows, STAGES, CLUSTER)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
