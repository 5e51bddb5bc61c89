"""Our SDPO and SDFT trainers beside TRL's: losses, gradients, logs and a whole run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from exactness import assert_no_worse_than_torch
from host_models import FAMILIES, assert_close, neighbour, tiny_model, with_lora
from peft import LoraConfig
from trl.experimental import sdft, sdpo
from trl_hosts import (
    COMPILED,
    PROMPTS,
    batch,
    common,
    compiled_loss_and_gradients,
    loss_and_gradients,
    make,
    prompts,
)

from selfdistill_kernels.integrations.trl import self_distillation as fused

KINDS = {
    "sdpo": (sdpo.SDPOTrainer, fused.SDPOTrainer, sdpo.SDPOConfig),
    "sdft": (sdft.SDFTTrainer, fused.SDFTTrainer, sdft.SDFTConfig),
}
MODES: list[dict[str, Any]] = [
    {"distillation_mode": "full_logits", "distillation_alpha": 0.0},
    {"distillation_mode": "full_logits", "distillation_alpha": 0.5},
    {"distillation_mode": "full_logits", "distillation_alpha": 1.0, "distillation_is_clip": None},
    {"distillation_mode": "topk_logits", "distillation_topk": 9, "distillation_add_tail": True},
    {"distillation_mode": "topk_logits", "distillation_topk": 9, "distillation_add_tail": False},
    {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
]


def lengths(text: list[str], **_: Any) -> list[float]:
    return [float(len(one)) for one in text]


def data(kind: str) -> Dataset:
    if kind == "sdpo":
        return prompts()
    return Dataset.from_dict({"prompt": PROMPTS, "privileged_context": ["it is so"] * len(PROMPTS)})


def both(kind: str, model: Any, folder: Any, peft: Any = None, **options: Any) -> list[Any]:
    theirs, ours, config = KINDS[kind]
    options = {"teacher_model_kind": "live", "num_generations": 2, **options}
    if kind == "sdpo":
        options = {"distillation_weight": 1.0, **options}
    found = []
    for trainer in (theirs, ours):
        args = config(**common(folder, **options))
        rewards = {"reward_funcs": lambda completions, **_: lengths(completions)}
        found.append(
            make(
                trainer, model, args, train_dataset=data(kind), peft_config=peft,
                **(rewards if kind == "sdpo" else {}),
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradients_and_log(kind: str, options: dict[str, Any], tmp_path) -> None:
    trainers = both(kind, tiny_model("llama"), tmp_path, temperature=0.8, **options)
    inputs = batch()
    inputs["old_per_token_logps"] = torch.full((4, 7), -5.0)
    inputs["self_distillation_mask"] = torch.tensor([1.0, 1.0, 0.0, 1.0])
    (loss, grads, log), (ours, our_grads, our_log) = (
        loss_and_gradients(trainer, inputs) for trainer in trainers
    )
    torch.testing.assert_close(ours, loss, rtol=2e-5, atol=1e-6)
    # The rest of a top-k's mass is one minus a sum, in float32.
    assert_close(our_grads, grads, 1e-4 if options.get("distillation_add_tail") else 1e-5)
    assert our_log.keys() == log.keys()
    for name, values in log.items():
        assert our_log[name] == pytest.approx(values, rel=1e-4), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_families(kind: str, family: str, tmp_path) -> None:
    trainers = both(kind, tiny_model(family), tmp_path, distillation_mode="full_logits")
    for trainer in trainers:
        trainer.teacher_model = neighbour(trainer.model)
    trainers[1]._teacher_head = fused.head_of(trainers[1].teacher_model)
    (loss, grads, _), (ours, our_grads, _) = (
        loss_and_gradients(trainer, batch()) for trainer in trainers
    )
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    assert_close(our_grads, grads)


@pytest.mark.parametrize("on_head", [False, True])
@pytest.mark.parametrize("teacher", ["live", "base", "ema"])
@pytest.mark.parametrize("kind", KINDS)
def test_lora(kind: str, teacher: str, on_head: bool, tmp_path) -> None:
    targets = ["q_proj", "lm_head"] if on_head else ["q_proj", "v_proj"]
    trainers = both(
        kind, tiny_model("llama"), tmp_path, LoraConfig(target_modules=targets, r=4),
        distillation_mode="full_logits", teacher_model_kind=teacher,
    )  # fmt: skip
    for trainer in trainers:
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__name__ == "PEFTAdapterEMACallback":
                callback._initialize_teacher_adapter()  # as when training begins
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    (loss, grads, _), (ours, our_grads, _) = (
        loss_and_gradients(trainer, batch()) for trainer in trainers
    )
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    assert_close(our_grads, grads)
    assert any("lm_head" in name for name in our_grads) == on_head


@pytest.mark.parametrize("kind", KINDS)
def test_the_workspace_reaches_the_loss(kind: str, tmp_path) -> None:
    _, trainer = both(kind, tiny_model("llama"), tmp_path, distillation_mode="full_logits")
    trainer.workspace = 64
    with pytest.raises(ValueError, match="workspace: 64 bytes cannot hold one tile"):
        loss_and_gradients(trainer, batch())


def test_nothing_to_learn_is_zero_with_gradients_of_zero(tmp_path) -> None:
    _, trainer = both("sdpo", tiny_model("llama"), tmp_path)
    inputs = batch() | {"self_distillation_mask": torch.zeros(4)}
    loss, grads, log = loss_and_gradients(trainer, inputs)
    assert loss == 0
    assert all(not grad.any() for grad in grads.values())
    assert log["self_distillation/distillation_loss"] == [0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_runs_with_the_same_seed_have_the_same_losses(kind: str, tmp_path) -> None:
    options = {"success_reward_threshold": 0.0} if kind == "sdpo" else {}
    losses = []
    for trainer in both(
        kind, tiny_model("qwen3"), tmp_path, max_steps=2, max_completion_length=6,
        learning_rate=1e-3, distillation_mode="full_logits", **options,
    ):  # fmt: skip
        torch.manual_seed(0)  # both were made before the first one draws
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(losses[0]) == 2
    assert max(losses[0]) > 0
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("mode", ["full_logits", "topk_logits"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_in_bfloat16(kind: str, mode: str, tmp_path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    options = {"distillation_mode": mode, "temperature": 0.8}
    if mode == "topk_logits":
        options["distillation_topk"] = 9
    theirs, ours = both(kind, model, tmp_path, **options)
    exact, _ = both(kind, model.float(), tmp_path, **options)
    found = [loss_and_gradients(trainer, batch()) for trainer in (ours, theirs, exact)]
    assert_no_worse_than_torch("loss", *(loss for loss, _, _ in found))
    assert_no_worse_than_torch("gradients", *(grads for _, grads, _ in found))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_by_the_trainer(kind: str, tmp_path) -> None:
    model, options = tiny_model("llama", num_hidden_layers=1), {"distillation_mode": "full_logits"}
    theirs, _ = both(kind, model, tmp_path, **options)
    loss, grads, _ = loss_and_gradients(theirs, batch())
    AcceleratorState._reset_state(reset_partial_state=True)
    _, ours = both(kind, model, tmp_path, **options, **COMPILED)
    our_loss, our_grads = compiled_loss_and_gradients(ours, batch())
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    assert_close(our_grads, grads)


def test_bf16_acts_on_model_and_loss(tmp_path) -> None:
    losses = []
    for bf16 in (False, True):
        for trainer in both(
            "sdft", tiny_model("llama"), tmp_path, max_steps=1, max_completion_length=6,
            distillation_mode="full_logits", bf16=bf16,
        ):  # fmt: skip
            torch.manual_seed(0)
            trainer.train()
            losses.append(trainer.state.log_history[0]["loss"])
        AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[3] == pytest.approx(losses[2], rel=5e-2)
    assert losses[3] != losses[1]


def test_what_is_not_supported_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"args.distillation_weight: 0.5 mixes in a policy loss"):
        both("sdpo", tiny_model("llama"), tmp_path, distillation_weight=0.5)
    _, trainer = both("sdft", tiny_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="does not support returning outputs"):
        trainer.compute_loss(trainer.model, batch(), return_outputs=True)
    model = with_lora(tiny_model("llama"), use_dora=True)
    with pytest.raises(ValueError, match="is a variant of LoRA"):
        both("sdft", model, tmp_path)
