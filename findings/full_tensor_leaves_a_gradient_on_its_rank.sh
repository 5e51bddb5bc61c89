#!/usr/bin/env bash
# torch 2.13.0 (FSDP2, DTensor)
#
# One would expect: the gradient of a weight that FSDP2 has sharded, taken through full_tensor() on two
# ranks with different data, is the sum or the mean over the ranks, as it is when FSDP2 gathers the weight
# in a forward of its own.
# Observed: each rank keeps the rows of its own shard out of its own gradient, and nothing is said: row 0
# has the gradient of rank 0's data alone, row 1 that of rank 1's. The default of grad_placements takes
# the gradient for one that all ranks have; full_tensor(grad_placements=[Partial("avg")]) gives the mean.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0'
cd "$folder"
cat > program.py <<'PYTHON'
import platform

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial


def run(rank: int) -> None:
    store = dist.FileStore("store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    layer = nn.Linear(1, 2, bias=False)
    fully_shard(layer)
    data = float(10 ** rank)  # 1 on rank 0, 10 on rank 1: the mean is 5.5
    found = {}
    for name, placements in (("default", None), ("Partial('avg')", [Partial("avg")])):
        layer.weight.grad = None
        weight = layer.weight.full_tensor(grad_placements=placements)
        (data * weight).sum().backward()
        found[name] = layer.weight.grad.full_tensor().flatten().tolist()
    layer.zero_grad()
    layer(torch.full((1, 1), data)).sum().backward()
    found["FSDP2's own forward"] = layer.weight.grad.full_tensor().flatten().tolist()
    if rank == 0:
        print("python", platform.python_version(), "| torch", torch.__version__)
        for name, gradient in found.items():
            print("gradient of the two rows,", name, gradient)
    assert found["FSDP2's own forward"] == [5.5, 5.5], "the behaviour has changed"
    assert found["Partial('avg')"] == [5.5, 5.5], "the behaviour has changed"
    assert found["default"] == [1.0, 10.0], "the behaviour has changed"
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(run, nprocs=2)
PYTHON
"$folder/venv/bin/python" program.py
