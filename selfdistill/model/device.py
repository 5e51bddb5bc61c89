"""Which device a run uses."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> str:
    """Return the device of `auto`: a GPU if there is one; every other name as it is."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
