"""Trainers of transformers and TRL on gloo ranks: what a launcher sets, FSDP2 on a CPU, shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig


def launched(rank: int) -> None:
    """Set what torchrun sets; the group is there already, so nothing is asked of the port."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "localhost", "MASTER_PORT": "0", "CI": "1",
    }  # fmt: skip


@contextmanager
def accelerate_state(kind: DistributedType = DistributedType.MULTI_CPU) -> Iterator[None]:
    """A trainer's share of accelerate's state, forgotten afterwards. On a CPU accelerate leaves
    FSDP out without a word and refuses tensor parallelism; here it takes both as on GPUs."""
    original = AcceleratorState.__init__

    def as_told(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        self.distributed_type = PartialState._shared_state["distributed_type"] = kind
        if kind is DistributedType.FSDP and fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin

    try:
        with mock.patch.object(AcceleratorState, "__init__", as_told):
            yield
    finally:
        # The group stays, and so does what is known of it.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        AcceleratorState._reset_state()
        GradientState._reset_state()


def fsdp2_arguments(layer: str) -> dict[str, Any]:
    """Of TrainingArguments, for models whose decoder has layers of this class."""
    return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layer}}


def loaded_in_shards(folder: Path | str, **sizes: int) -> PreTrainedModel:
    """Load a saved model in shards of transformers: tp_size, fsdp_size."""
    config = DistributedConfig(**sizes)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather what is sharded, and drop the names that wrappers add."""
    return {
        name.removeprefix("_orig_mod.").removeprefix("module."): (
            value.full_tensor() if hasattr(value, "full_tensor") else value
        ).detach().clone()
        for name, value in tensors.items()
    }  # fmt: skip
