"""Our DistillationTrainer beside TRL's: losses, gradients, logs and whole runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl
from accelerate.state import AcceleratorState
from host_models import FAMILIES, assert_close, neighbour, tiny_model
from peft import LoraConfig
from trl_hosts import batch, common, loss_and_gradients, make, prompts

from selfdistill_kernels.integrations.trl.distillation import DistillationTrainer


def both(model: Any, teacher: Any, folder: Any, peft: Any = None, **options: Any) -> list[Any]:
    args = [trl.DistillationConfig(**common(folder, **options)) for _ in range(2)]
    return [
        make(kind, model, a, teacher_model=teacher, train_dataset=prompts(), peft_config=peft)
        for kind, a in zip((trl.DistillationTrainer, DistillationTrainer), args, strict=True)
    ]


@pytest.mark.parametrize("items", [None, 23])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradients_and_log(family: str, beta: float, items: int | None, tmp_path) -> None:
    model = tiny_model(family)
    trainers = both(model, neighbour(model), tmp_path, beta=beta, temperature=0.8)
    inputs = batch()
    if items is not None:
        inputs["num_items_in_batch"] = torch.tensor(items)
    (loss, grads, log), (ours, our_grads, our_log) = (
        loss_and_gradients(trainer, inputs) for trainer in trainers
    )
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    assert_close(our_grads, grads)
    assert our_log["entropy"] == pytest.approx(log["entropy"], rel=1e-5)


def test_the_workspace_reaches_the_loss(tmp_path) -> None:
    model = tiny_model("llama")
    _, trainer = both(model, neighbour(model), tmp_path)
    trainer.workspace = 64
    with pytest.raises(ValueError, match="workspace: 64 bytes cannot hold one tile"):
        loss_and_gradients(trainer, batch())


def test_tool_tokens_are_left_out(tmp_path) -> None:
    model = tiny_model("llama")
    inputs = batch()
    inputs["tool_mask"] = (torch.arange(7) % 2).expand(4, 7)
    (loss, grads, _), (ours, our_grads, _) = (
        loss_and_gradients(trainer, inputs) for trainer in both(model, neighbour(model), tmp_path)
    )
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    assert_close(our_grads, grads)


def test_lora_on_the_body(tmp_path) -> None:
    model = tiny_model("llama")
    peft = LoraConfig(target_modules=["q_proj", "v_proj"], r=4)
    (_, grads, _), (_, our_grads, _) = (
        loss_and_gradients(trainer, batch())
        for trainer in both(model, neighbour(model), tmp_path, peft)
    )
    assert_close(our_grads, grads)
    assert all("lora" in name for name in our_grads)


def test_a_teacher_in_bfloat16(tmp_path) -> None:
    model = tiny_model("llama")
    teacher = neighbour(model).to(torch.bfloat16)
    (_, grads, _), (_, our_grads, _) = (
        loss_and_gradients(trainer, batch()) for trainer in both(model, teacher, tmp_path)
    )
    # TRL keeps the scores of a bfloat16 product in float32, torch's linear rounds them.
    assert_close(our_grads, grads, 2e-2)


def test_both_models_in_bfloat16(tmp_path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    (_, grads, _), (_, our_grads, _) = (
        loss_and_gradients(trainer, batch()) for trainer in both(model, neighbour(model), tmp_path)
    )
    assert_close(our_grads, grads, 2e-2)


def test_bf16_of_the_configuration_has_no_effect_on_float32_models(tmp_path) -> None:
    """Nor has it in TRL, whose loss goes around the forward that accelerate casts in."""
    model = tiny_model("llama")
    losses = []
    for bf16 in (False, True):
        for trainer in both(model, neighbour(model), tmp_path, bf16=bf16):
            wrapped = trainer.accelerator.prepare_model(trainer.model)
            losses.append(trainer.compute_loss(wrapped, batch()).item())
        AcceleratorState._reset_state(reset_partial_state=True)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_runs_with_the_same_seed_have_the_same_losses(tmp_path) -> None:
    model = tiny_model("qwen3")
    losses = []
    for trainer in both(
        model, neighbour(model), tmp_path, max_steps=3, max_completion_length=6,
        learning_rate=1e-3, gradient_accumulation_steps=2, per_device_train_batch_size=2,
    ):  # fmt: skip
        torch.manual_seed(0)  # both were made before the first one draws
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_what_is_not_supported_is_refused(tmp_path) -> None:
    model = tiny_model("llama")
    args = trl.DistillationConfig(**common(tmp_path))
    with pytest.raises(ValueError, match="teacher_model: a teacher behind a server is not"):
        make(DistillationTrainer, model, args, teacher_model=None, train_dataset=prompts())
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    args = trl.DistillationConfig(**common(tmp_path, **options))
    teacher = neighbour(model)
    with pytest.raises(ValueError, match="torch_compile: TRL goes around what it has compiled"):
        make(DistillationTrainer, model, args, teacher_model=teacher, train_dataset=prompts())
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        both(model, neighbour(model), tmp_path, LoraConfig(target_modules=["lm_head"]))
