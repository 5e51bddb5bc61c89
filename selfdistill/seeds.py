"""Seeds of everything that is random, derived from the one in the configuration."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: object) -> int:
    """Return a seed that depends on all parts, so that no two uses share random numbers."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
