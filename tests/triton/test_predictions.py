"""The sweep's DRAM traffic, by the cost model and by the kernel's own walk: the same bytes."""

from __future__ import annotations

import pytest

from benchmarks import cost
from selfdistill_kernels.backends.triton.plan import sweep_traffic

SHAPES = [(8192, 4096, 128256), (8192, 2048, 151936), (4096, 1024, 151936), (70, 96, 1021)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gpu", cost.GPUS.values(), ids=list(cost.GPUS))
def test_they_agree(gpu, shape):
    size = cost.Size(*shape)
    row_bytes = size.hidden * size.itemsize
    walked = sweep_traffic(
        gpu.machine,
        gpu.tile,
        rows=size.tokens,
        vocabulary=size.vocabulary,
        row_bytes=size.models * row_bytes,
        head_row_bytes=row_bytes,
    )
    written = cost.STATISTICS_BYTES * size.tokens
    assert cost.sweep(size, gpu).bytes == walked.predicted + written
