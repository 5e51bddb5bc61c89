"""Two processes of DDP have the gradients that TRL has in one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from host_models import assert_close, gradients, neighbour, tiny_model
from process_groups import in_processes
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from trl.experimental import sdft
from trl_hosts import batch, common, loss_and_gradients, make, prompts

from selfdistill_kernels.integrations.trl import distillation, self_distillation


def trainer(kind: str, folder: str, ours: bool) -> Any:
    model, settings = tiny_model("llama"), common(folder)
    if ours:
        settings["ddp_backend"] = "gloo"
    if kind == "distillation":
        host = distillation.DistillationTrainer if ours else trl.DistillationTrainer
        args = trl.DistillationConfig(**settings, beta=0.5)
        teacher = neighbour(model)
        return make(host, model, args, teacher_model=teacher, train_dataset=prompts())
    host = self_distillation.SDFTTrainer if ours else sdft.SDFTTrainer
    args = sdft.SDFTConfig(
        **settings, distillation_mode="full_logits", teacher_model_kind="live", num_generations=2,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["one"] * 4, "privileged_context": ["it is"] * 4})
    return make(host, model, args, train_dataset=data)


def inputs() -> dict[str, Tensor]:
    return batch() | {"num_items_in_batch": torch.tensor(18.0)}


def ranks(rank: int, argument: tuple[str, str]) -> dict[str, Tensor]:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "CI": "1",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
    }  # fmt: skip
    ours = trainer(*argument, ours=True)
    ours.current_gradient_accumulation_steps = 2
    ours.model.train()
    rows = slice(2 * rank, 2 * rank + 2)
    mine = {name: value[rows] if value.dim() else value for name, value in inputs().items()}
    wrapped = DistributedDataParallel(ours.model)
    ours.compute_loss(wrapped, mine).backward()
    return gradients(ours.model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["distillation", "sdft"])
def test_gradients(kind: str, tmp_path) -> None:
    _, expected, _ = loss_and_gradients(trainer(kind, str(tmp_path), ours=False), inputs())
    for found in in_processes(ranks, (kind, str(tmp_path)), tmp_path):
        assert_close(found, expected)
