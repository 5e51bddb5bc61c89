"""Runs a function in the processes of one gloo group.

Importing torch, transformers and TRL takes seconds for every process. So one server imports what
the caller has imported, computes nothing, and forks the ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Packages whose modules the server imports.
SLOW = ("torch", "transformers", "accelerate", "datasets", "peft", "trl")


def in_processes(
    function: Callable[..., Any], argument: Any, folder: Path, *, ranks: int = 2
) -> list[Any]:
    """Return what `function(rank, argument)` of a module on sys.path returned on each rank."""
    # Of no effect when the server runs already.
    forkserver.set_forkserver_preload(
        [name for name in list(sys.modules) if name.partition(".")[0] in SLOW]
    )
    mp.start_processes(
        _run, args=(function, argument, folder, ranks), nprocs=ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _run(rank: int, function: Callable[..., Any], argument: Any, folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        torch.save(function(rank, argument), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
