"""Trainers of TRL around tiny models, and batches as their generation would leave them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from host_models import gradients
from tiny_tokenizers import byte_level
from torch import Tensor, nn
from torch._dynamo.utils import counters

PROMPTS = ["one and two", "three", "is it so", "again"]


def common(folder: Path, **options: Any) -> dict[str, Any]:
    """What every configuration needs here."""
    return {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": 4, "gradient_checkpointing": False, "logging_steps": 1,
        "save_strategy": "no", "seed": 7, **options,
    }  # fmt: skip


def prompts() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


def make(trainer: Any, model: nn.Module, args: Any, **options: Any) -> Any:
    """Build a trainer around a copy of the model, or around one that was loaded in shards."""
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        model = copy.deepcopy(model)
    return trainer(model=model, args=args, processing_class=byte_level(), **options)


def batch(vocabulary: int = 250) -> dict[str, Tensor]:
    """Prompts padded on the left, completions on the right, one of them empty; 0/1 as integers."""
    generator = torch.Generator().manual_seed(17)

    def ids(*shape: int) -> Tensor:
        return torch.randint(3, vocabulary, shape, generator=generator)

    prompt_mask = torch.ones(4, 5, dtype=torch.long)
    prompt_mask[0, :2] = 0
    completion_mask = torch.ones(4, 7, dtype=torch.long)
    completion_mask[1, 4:] = 0
    completion_mask[3] = 0
    context = ids(4, 3)
    prompt, completion = ids(4, 5), ids(4, 7)
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": completion_mask,
        "teacher_input_ids": torch.cat([context, prompt, completion], dim=1),
        "teacher_attention_mask": torch.cat(
            [torch.ones_like(context), prompt_mask, completion_mask], dim=1
        ),
    }


COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}


def compiled_loss_and_gradients(trainer: Any, inputs: dict[str, Tensor]) -> Any:
    """As `loss_and_gradients` of a trainer with the options COMPILED, whose frames are counted."""
    torch._dynamo.reset()
    counters.clear()
    trainer.model = trainer.accelerator.prepare_model(trainer.model)
    loss, found, _ = loss_and_gradients(trainer, inputs)
    assert isinstance(trainer.model, torch._dynamo.OptimizedModule)
    assert counters["stats"]["unique_graphs"] > 0
    return loss, {name.removeprefix("_orig_mod."): grad for name, grad in found.items()}


def loss_and_gradients(trainer: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """The loss of a trainer on a batch, the gradients of its model, and what it logged."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer.compute_loss(trainer.model, copy.deepcopy(inputs), **options)
    loss.backward()
    logged = {name: list(values) for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradients(trainer.model), logged
