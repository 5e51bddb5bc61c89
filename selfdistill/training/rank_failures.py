"""Whose failure ended a run of several ranks: the one that failed says so, the others name it."""

from __future__ import annotations

import json
import time
from contextlib import suppress

import torch.distributed as dist

from selfdistill.errors import UserError

# Seconds in which ranks that still run notice that another one failed.
_PATIENCE = 3.0


class RankFailedError(UserError):
    """Another rank failed or disappeared; the message names it."""


def failure_elsewhere(
    store: dist.Store, *, rank: int, size: int, error: BaseException
) -> RankFailedError | None:
    """Tell the other ranks about this one's error, or find out whose error it follows from.

    Args:
        store: shared by the ranks, for failures only.
        rank: this process, from 0.
        size: how many there are.
        error: what ended this rank.

    Returns:
        The error that names the other rank; None when this rank is the one that failed.
    """
    if not _is_broken_connection(error):
        with suppress(dist.DistError):
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            # The first one that fails is the cause; what others say follows from it.
            store.compare_set("first", "", json.dumps({"rank": rank, "why": why}))
            _leave(store, rank, size, gone={rank})
        return None
    try:
        if store.check(["first"]):
            found = json.loads(store.get("first"))
            gone = {found["rank"]}
            why = f"rank {found['rank']} failed with {found['why'].rstrip('.')}"
        else:
            gone = _silent_ranks(store, rank, size)
            names = " and ".join(map(str, sorted(gone)))
            why = f"rank {names} does not answer (killed, perhaps for want of memory)"
            if not gone:
                why = f"the connection to another rank broke ({error})"
        _leave(store, rank, size, gone=gone)
    except dist.DistError:  # the store lives in rank 0, unless torchrun keeps it
        why = "rank 0 does not answer (killed, perhaps for want of memory)"
    return RankFailedError(
        f"{why}. Rank {rank} of {size} cannot go on without it; the last checkpoint is "
        "intact: mend the cause, then start all ranks again with --resume"
    )


def _leave(store: dist.Store, rank: int, size: int, *, gone: set[int]) -> None:
    """Let the others notice; the rank that keeps the store stays until they have read it."""
    if dist.is_initialized():
        dist.destroy_process_group()  # closes the connections that the others wait at
    store.set(f"heard/{rank}", "")
    if rank == 0:
        _wait_for(store, [f"heard/{other}" for other in range(size) if other not in gone])


def _is_broken_connection(error: BaseException | None) -> bool:
    """Tell whether an error, or what it came from, says no more than that a rank is not there."""
    # Ranks that share an engine meet inside of it, and the engine says in its words what failed.
    while error is not None:
        # Gloo raises nothing more special than this.
        if isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        ):
            return True
        error = error.__cause__
    return False


def _silent_ranks(store: dist.Store, rank: int, size: int) -> set[int]:
    """Return the ranks that do not say that they are still there."""
    names = {other: f"there/{other}" for other in range(size)}
    store.set(names[rank], "")
    _wait_for(store, list(names.values()))
    return {other for other, name in names.items() if not store.check([name])}


def _wait_for(store: dist.Store, names: list[str]) -> None:
    """Wait a few seconds until the store has all of these names, or not."""
    deadline = time.monotonic() + _PATIENCE
    while not store.check(names) and time.monotonic() < deadline:
        time.sleep(0.05)
