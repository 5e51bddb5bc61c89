"""Memory of the native backend: fresh tensors in large pages, and one workspace between calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Where the system has large pages, they are of this size; a smaller tensor holds none.
LARGE_PAGE = 1 << 21
# At most one workspace is kept; a list because its `pop` is atomic, so that a call of another
# thread finds it empty and makes a workspace of its own.
_kept: list[Tensor] = []
# Held while a lease is.
_leases = threading.Lock()


def empty(shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised tensor; on the CPU in large pages where there are some.

    Page faults of fresh tiles and gradients cost a tenth of the GEMMs (docs/decisions).
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and tensor.nbytes >= LARGE_PAGE:
        torch.ops.selfdistill.advise_huge_pages_(tensor)
    return tensor


@contextmanager
def workspace(elements: int, device: torch.device) -> Iterator[Tensor]:
    """Lend a flat float32 tensor of so many elements, with undefined values.

    On the CPU it is kept for the next call: even in large pages, the system clears 200 MiB in the
    time of several percent of the GEMMs. `release_workspace` gives it back. GPUs have torch's
    caching allocator.
    """
    if device.type != "cpu":
        yield torch.empty((elements,), dtype=torch.float32, device=device)
        return
    space = _take(elements, device)
    try:
        yield space[:elements]
    finally:
        _kept[:] = [space]


class Lease:
    """A workspace that outlives the call that asked for it (`lease`).

    Args:
        space: flat float32, with undefined values at first.
    """

    def __init__(self, space: Tensor) -> None:
        self._spaces = [space]

    @property
    def space(self) -> Tensor:
        """Until the release."""
        return self._spaces[0]

    def release(self) -> None:
        """Give the memory back; whoever drops the lease does that, too."""
        try:
            space = self._spaces.pop()
        except IndexError:
            return
        _kept[:] = [space]
        _leases.release()

    __del__ = release


def lease(elements: int, device: torch.device) -> Lease | None:
    """Memory of so many elements until it is released, on the CPU.

    None while another lease is held: however many calls wait for their backward pass, one of them
    holds a workspace.
    """
    if device.type != "cpu" or not _leases.acquire(blocking=False):
        return None
    try:
        return Lease(_take(elements, device))
    except BaseException:
        _leases.release()
        raise


def _take(elements: int, device: torch.device) -> Tensor:
    """The workspace that was kept, or a larger one."""
    try:
        found: Tensor | None = _kept.pop()
    except IndexError:
        found = None
    if found is None or found.numel() < elements:
        del found
        # Not an inference tensor: those cannot be written outside of inference mode later.
        with torch.inference_mode(False):
            found = empty((elements,), device)
    return found


def release_workspace() -> None:
    """Give the memory back that the native CPU kernels keep between calls, but for what waits for
    a backward pass (at most the largest
    `workspace` used so far; "auto" is 256 MiB or less unless one row of logits needs more)."""
    _kept.clear()
