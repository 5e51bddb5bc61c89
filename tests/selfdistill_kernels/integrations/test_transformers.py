"""The fused Trainer beside transformers' own: cross entropy, and KL by materialised logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from exactness import assert_no_worse_than_torch
from host_models import FAMILIES, assert_close, gradients, neighbour, tiny_model, with_lora
from host_ranks import (
    accelerate_state,
    fsdp2_arguments,
    launched,
    loaded_in_shards,
    whole,
)
from process_groups import in_processes
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainingArguments

from selfdistill_kernels.integrations.transformers import FusedLossTrainer


def rows(count: int = 16) -> list[dict[str, Any]]:
    """Sequences of one length whose labels are not: the batches have other numbers of tokens."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for index in range(count):
        ids = torch.randint(3, 300, (12,), generator=generator)
        labels = ids.clone()
        labels[: 2 + index % 7] = -100
        context = torch.randint(3, 300, (4,), generator=generator)
        found.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": labels,
                "teacher_input_ids": torch.cat([context, ids]),
                "teacher_attention_mask": torch.ones(16, dtype=torch.long),
                "teacher_labels": torch.cat([torch.full((4,), -100), labels]),
            }
        )
    return found


def plain(dataset: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("teacher")} for row in dataset]


class MaterialisedKL(Trainer):
    """Forward KL to a teacher that sees its context, by plain torch."""

    teacher: nn.Module

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(rows(1)[0])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        kept = inputs["labels"][:, 1:] != -100
        teacher_kept = inputs["teacher_labels"][:, 1:] != -100
        student = model(inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1][kept]
        with torch.no_grad():
            read = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
            target = self.teacher(*read).logits[:, :-1][teacher_kept]
        kl = nn.functional.kl_div(
            student.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none"
        )
        loss = kl.sum() / (kept.sum() if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss


def train(
    kind: Any, model: nn.Module, folder: Any, dataset: list[dict[str, Any]], *,
    arguments: dict[str, Any] | None = None, **options: Any,
) -> tuple[list[float], dict[str, Tensor]]:  # fmt: skip
    """Losses of three steps and of an evaluation, and the weights after them."""
    settings = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "max_steps": 3,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "save_strategy": "no", "seed": 3, "optim": "sgd",
        "per_device_eval_batch_size": 4, **(arguments or {}),
    }  # fmt: skip
    in_shards = getattr(model, "is_distributed_loading_by_transformers", False)
    trainer = kind(
        model=model if in_shards else copy.deepcopy(model), args=TrainingArguments(**settings),
        train_dataset=dataset, eval_dataset=dataset, **options,
    )  # fmt: skip
    if kind is MaterialisedKL:
        trainer.teacher = neighbour(model)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    losses.append(trainer.evaluate()["eval_loss"])
    named = trainer.model.named_parameters()
    return losses, whole({name: weight for name, weight in named if weight.requires_grad})


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_entropy_is_that_of_the_trainer(family: str, tmp_path) -> None:
    model, dataset = tiny_model(family), plain(rows())
    theirs, weights = train(Trainer, model, tmp_path, dataset)
    ours, our_weights = train(FusedLossTrainer, model, tmp_path, dataset)
    assert len(ours) == 4
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert_close(our_weights, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_is_that_of_materialised_logits(family: str, tmp_path) -> None:
    model = tiny_model(family)
    theirs, weights = train(MaterialisedKL, model, tmp_path, rows())
    ours, our_weights = train(
        FusedLossTrainer, model, tmp_path, rows(), teacher=neighbour(model),
        objective="forward_kl",
    )  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert_close(our_weights, weights)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]], ids=str)
def test_lora(targets: list[str], tmp_path) -> None:
    model = with_lora(tiny_model("llama"), target_modules=targets)
    theirs, weights = train(Trainer, model, tmp_path, plain(rows()))
    ours, our_weights = train(FusedLossTrainer, model, tmp_path, plain(rows()))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert_close(our_weights, weights)


def test_gradient_checkpointing(tmp_path) -> None:
    model, arguments = tiny_model("llama"), {"gradient_checkpointing": True}
    theirs, weights = train(Trainer, model, tmp_path, plain(rows()), arguments=arguments)
    ours, our_weights = train(FusedLossTrainer, model, tmp_path, plain(rows()), arguments=arguments)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert_close(our_weights, weights)


def test_compiled_by_the_trainer(tmp_path) -> None:
    model, dataset = tiny_model("llama", num_hidden_layers=1), plain(rows())
    arguments = {"torch_compile": True, "torch_compile_backend": "eager"}
    expected, weights = train(FusedLossTrainer, model, tmp_path, dataset)
    torch._dynamo.reset()
    counters.clear()
    found, found_weights = train(FusedLossTrainer, model, tmp_path, dataset, arguments=arguments)
    assert counters["stats"]["unique_graphs"] > 0
    assert found == pytest.approx(expected, rel=1e-5)
    assert_close({k.removeprefix("_orig_mod."): v for k, v in found_weights.items()}, weights)


def test_bf16_acts_on_model_and_loss(tmp_path) -> None:
    model, arguments = tiny_model("llama"), {"bf16": True}
    exact, _ = train(FusedLossTrainer, model, tmp_path, plain(rows()))
    theirs, _ = train(Trainer, model, tmp_path, plain(rows()), arguments=arguments)
    ours, _ = train(FusedLossTrainer, model, tmp_path, plain(rows()), arguments=arguments)
    assert all(one != other for one, other in zip(ours, exact, strict=True))
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_models_in_bfloat16(tmp_path) -> None:
    """Loss and gradients, which the weights after a step of SGD would hide in their rounding."""
    model = tiny_model("llama").to(torch.bfloat16)
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in plain(rows(1))[0]}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    losses, grads = [], []
    exact = copy.deepcopy(model).float()
    for kind, start in ((FusedLossTrainer, model), (Trainer, model), (Trainer, exact)):
        trainer = kind(copy.deepcopy(start), arguments)
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(trainer.model))
    assert_no_worse_than_torch("loss", *losses)
    assert_no_worse_than_torch("gradients", *grads)


SAVED = ("student", "teacher")
SHARDED = ("llama", "qwen3")  # with a head of its own, and with one that is tied


def ranks(rank: int, folder: str) -> dict[str, Any]:
    """Losses and weights of runs on two ranks, by how the model lies on them."""
    launched(rank)
    found = {}

    def run(
        name: str, model: nn.Module, teacher: nn.Module,
        kind: DistributedType = DistributedType.MULTI_CPU, **arguments: Any,
    ) -> None:  # fmt: skip
        settings = {
            "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 2,
            "ddp_backend": "gloo", **arguments,
        }  # fmt: skip
        with accelerate_state(kind):
            losses, weights = train(
                FusedLossTrainer, model, folder, rows(), teacher=teacher, objective="forward_kl",
                arguments=settings,
            )  # fmt: skip
        found[name] = {"losses": losses, "weights": weights}

    model = tiny_model("llama")
    run("llama in ddp", model, neighbour(model))
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    run("llama in compiled ddp", model, neighbour(model), **compiled)
    for family in SHARDED:
        model = tiny_model(family)
        teacher = neighbour(model)
        layer = type(model.model.layers[0]).__name__
        fsdp2 = fsdp2_arguments(layer)
        run(f"{family} in fsdp2", model, teacher, DistributedType.FSDP, **fsdp2)

        saved = f"{folder}/{family} "
        model, teacher = (loaded_in_shards(saved + name, fsdp_size=2) for name in SAVED)
        run(f"{family} loaded in fsdp2", model, teacher.requires_grad_(False))
        model, teacher = (loaded_in_shards(saved + name, tp_size=2) for name in SAVED)
        run(
            f"{family} loaded in tensor parallel", model, teacher.requires_grad_(False),
            DistributedType.MULTI_GPU, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        )  # fmt: skip
    return found


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path) -> None:
    expected = {}
    for family in SHARDED:
        model = tiny_model(family)
        model.save_pretrained(tmp_path / f"{family} student")
        neighbour(model).save_pretrained(tmp_path / f"{family} teacher")
        expected[family] = train(MaterialisedKL, model, tmp_path, rows())
    for found in in_processes(ranks, str(tmp_path), tmp_path):
        assert len(found) == 8
        for name, one in found.items():
            losses, weights = expected[name.split()[0]]
            assert one["losses"] == pytest.approx(losses, rel=1e-5), name
            # After an evaluation FSDP2 may have a tied weight under both of its names.
            assert_close({key: one["weights"][key] for key in weights}, weights)


@pytest.mark.parametrize(
    ("options", "arguments", "name"),
    [
        ({"compute_metrics": lambda _: {}}, {}, "compute_metrics"),
        ({"compute_loss_func": lambda *_: 0}, {}, "compute_loss_func"),
        ({}, {"label_smoothing_factor": 0.1}, "args.label_smoothing_factor"),
    ],
)
def test_what_needs_logits_is_refused(options: dict, arguments: dict, name: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{name}: not supported by the fused loss"):
        train(
            FusedLossTrainer, tiny_model("llama"), tmp_path, plain(rows()),
            arguments=arguments, **options,
        )  # fmt: skip


def test_a_batch_without_labels_is_refused(tmp_path) -> None:
    trainer = FusedLossTrainer(
        tiny_model("llama"), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    )
    with pytest.raises(ValueError, match="labels: missing among input_ids"):
        trainer.compute_loss(trainer.model, {"input_ids": rows()[0]["input_ids"][None]})
