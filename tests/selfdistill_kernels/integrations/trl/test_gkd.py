"""Our GKDTrainer beside TRL's: losses, gradients and a whole run."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from exactness import assert_no_worse_than_torch
from host_models import FAMILIES, assert_close, neighbour, tiny_model, with_lora
from torch import Tensor
from trl.experimental import gkd
from trl_hosts import COMPILED, batch, common, compiled_loss_and_gradients, make

from selfdistill_kernels.integrations.trl.gkd import GKDTrainer


def messages() -> Dataset:
    turns = [
        [{"role": "user", "content": f"is it {n}"}, {"role": "assistant", "content": f"it is {n}"}]
        for n in range(4)
    ]
    return Dataset.from_dict({"messages": turns})


def both(model: Any, folder: Any, teacher: Any = None, **options: Any) -> list[Any]:
    found = []
    teacher = neighbour(model) if teacher is None else teacher
    for trainer in (gkd.GKDTrainer, GKDTrainer):
        args = gkd.GKDConfig(**common(folder, max_length=64, **options))
        found.append(
            make(
                trainer, model, args, teacher_model=copy.deepcopy(teacher),
                train_dataset=messages(),
            )
        )  # fmt: skip
    return found


def gkd_batch() -> dict[str, Tensor]:
    rows = batch()
    ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
    read = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
    labels = torch.where(read != 0, ids, -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": read, "labels": labels}


def test_the_workspace_reaches_the_loss(tmp_path) -> None:
    _, trainer = both(tiny_model("llama"), tmp_path)
    trainer.workspace = 64
    with pytest.raises(ValueError, match="workspace: 64 bytes cannot hold one tile"):
        trainer.compute_loss(trainer.model, gkd_batch())


def step(trainer: Any, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, gkd_batch(), **options)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.detach(), {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("items", [None, torch.tensor(23)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family: str, beta: float, items: Tensor | None, tmp_path) -> None:
    trainers = both(tiny_model(family), tmp_path, beta=beta)
    (loss, grads), (ours, our_grads) = (step(t, num_items_in_batch=items) for t in trainers)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    assert_close(our_grads, grads)


def test_runs_with_the_same_seed_have_the_same_losses(tmp_path) -> None:
    losses = []
    for trainer in both(
        tiny_model("qwen3"), tmp_path, max_steps=3, max_new_tokens=6, learning_rate=1e-3,
        eval_strategy="no",
    ):  # fmt: skip
        random.seed(0)  # TRL draws whose completion is read from Python's own generator
        torch.manual_seed(0)  # both were made before the first one draws
        trainer.train()
        trainer.eval_dataset = trainer.train_dataset
        history = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        losses.append([*history, trainer.evaluate(trainer.train_dataset)["eval_loss"]])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_lora(tmp_path) -> None:
    model = tiny_model("llama")
    teacher = neighbour(model)
    trainers = both(with_lora(model, target_modules=["q_proj", "v_proj"]), tmp_path, teacher)
    (loss, grads), (ours, our_grads) = (step(t) for t in trainers)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    assert_close(our_grads, grads)


def test_trl_refuses_lora_on_the_head(tmp_path) -> None:
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        both(with_lora(tiny_model("llama")), tmp_path)


def test_models_in_bfloat16(tmp_path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    teacher = neighbour(model)
    theirs, ours = both(model, tmp_path, teacher)
    exact, _ = both(model.float(), tmp_path, copy.deepcopy(teacher).float())
    found = [step(trainer) for trainer in (ours, theirs, exact)]
    assert_no_worse_than_torch("loss", *(loss for loss, _ in found))
    assert_no_worse_than_torch("gradients", *(grads for _, grads in found))


def test_compiled_by_the_trainer(tmp_path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    loss, grads = step(both(model, tmp_path)[0])
    AcceleratorState._reset_state(reset_partial_state=True)
    _, ours = both(model, tmp_path, **COMPILED)
    our_loss, our_grads = compiled_loss_and_gradients(ours, gkd_batch())
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    assert_close(our_grads, grads)


def test_bf16_acts_on_model_and_loss(tmp_path) -> None:
    losses = []
    for bf16 in (False, True):
        for trainer in both(
            tiny_model("llama"), tmp_path, max_steps=1, lmbda=0.0, bf16=bf16, logging_steps=1,
        ):  # fmt: skip
            torch.manual_seed(0)
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[3] == pytest.approx(losses[2], rel=2e-2)
    assert losses[3] != losses[1]


def test_metrics_of_logits_are_refused(tmp_path) -> None:
    model = tiny_model("llama")
    args = gkd.GKDConfig(**common(tmp_path))
    with pytest.raises(ValueError, match="compute_metrics: logits to measure are not made"):
        make(
            GKDTrainer, model, args, teacher_model=neighbour(model), train_dataset=messages(),
            compute_metrics=lambda _: {},
        )  # fmt: skip
