"""What torch.autocast asks of the public functions, read so that torch.compile can trace it."""

from __future__ import annotations

import torch

# Devices of tensors for which torch.is_autocast_enabled raises. Dynamo before torch 2.13 cannot
# trace torch.amp.is_autocast_available, and marking that call as a constant imports all of Dynamo.
WITHOUT_AUTOCAST = ("meta", "lazy", "vulkan")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that torch.nn.functional.linear would cast to, None without autocast."""
    kind = device.type
    if kind not in WITHOUT_AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None
