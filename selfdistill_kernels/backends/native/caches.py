"""The caches of this machine's processor, for the tile plan of the CPU backend."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 1 << 20
CPU0 = Path("/sys/devices/system/cpu/cpu0/cache")
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Caches:
    """Sizes in bytes.

    Attributes:
        last: the last level, which the cores share.
        source: where the number comes from: "sysfs", "sysconf" or "assumed".
    """

    last: int
    source: str

    def describe(self) -> str:
        """Such as "32 MiB last-level cache (sysfs)"."""
        return f"{self.last / MEBIBYTE:g} MiB last-level cache ({self.source})"


# Where nothing can be read (macOS, some containers and virtual machines): a small desktop's L3. Too
# small a number costs narrower slabs, too large a one costs slabs that are read from memory twice.
ASSUMED = Caches(16 * MEBIBYTE, "assumed")


@functools.cache
def machine_caches() -> Caches:
    """Those of the first processor, read once."""
    return read_sysfs(CPU0) or read_sysconf() or ASSUMED


def read_sysfs(directory: Path) -> Caches | None:
    """From Linux's description of one processor: its highest level, None where there is none."""
    sizes: dict[int, int] = {}
    for entry in directory.glob("index*"):
        try:
            if (entry / "type").read_text().strip() == "Instruction":
                continue
            level = int((entry / "level").read_text())
            sizes[level] = max(sizes.get(level, 0), _bytes((entry / "size").read_text().strip()))
        except (OSError, ValueError, KeyError):
            continue
    last = sizes[max(sizes)] if sizes else 0
    return Caches(last, "sysfs") if last > 0 else None


def read_sysconf() -> Caches | None:
    """From the C library, which says 0 or -1 for what it does not know."""
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        try:
            size = os.sysconf(name)
        except (AttributeError, OSError, ValueError):
            continue
        if size > 0:
            return Caches(size, "sysconf")
    return None


def _bytes(text: str) -> int:
    """Read a size as Linux writes it, such as "2048K", in bytes."""
    return int(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else int(text)
