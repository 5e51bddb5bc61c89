"""What no fused loss does in a trainer of TRL."""

from __future__ import annotations

from typing import Any


def refuse(option: str, problem: str, remedy: str) -> None:
    """Raise ValueError in the form that all refusals have."""
    raise ValueError(f"{option}: {problem} by the fused loss; {remedy}")


def refuse_hosts(trainer: Any) -> None:
    """Raise ValueError for what is refused in every trainer.

    Args:
        trainer: a trainer of TRL whose __init__ has run.
    """
    if trainer.is_deepspeed_enabled:
        refuse(
            "args.deepspeed", "DeepSpeed's partitioned weights are not gathered",
            "use DDP or FSDP2, or TRL's own trainer",
        )  # fmt: skip
    if getattr(trainer, "_is_vlm", False):
        refuse(
            "processing_class", "vision-language models are not supported",
            "use TRL's own trainer for them",
        )  # fmt: skip


def can_check_heads(trainer: Any) -> bool:
    """False where weights are in pieces by the time that the trainer exists."""
    return not trainer.is_fsdp_enabled
