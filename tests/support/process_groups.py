"""Runs a function in two processes of one gloo group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(function: Callable[..., Any], argument: Any, folder: Path) -> list[Any]:
    """Return what `function(rank, argument)` of a module on sys.path returned on each rank."""
    mp.spawn(_run, args=(function, argument, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _run(rank: int, function: Callable[..., Any], argument: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        torch.save(function(rank, argument), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
