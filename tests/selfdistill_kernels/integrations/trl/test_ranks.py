"""Two processes have the gradients that TRL has in one: DDP, FSDP2 and tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl
from accelerate.utils import DistributedType
from datasets import Dataset
from host_models import assert_close, gradients, neighbour, tiny_model
from host_ranks import accelerate_state, fsdp2_arguments, launched, loaded_in_shards, whole
from process_groups import in_processes
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl.experimental import gkd, sdft, sdpo
from trl.models import prepare_fsdp
from trl_hosts import COMPILED, batch, common, make, prompts

from selfdistill_kernels.integrations import head_of
from selfdistill_kernels.integrations.trl import distillation, self_distillation
from selfdistill_kernels.integrations.trl.gkd import GKDTrainer

HOSTS = {
    "distillation": (trl.DistillationTrainer, distillation.DistillationTrainer),
    "sdpo": (sdpo.SDPOTrainer, self_distillation.SDPOTrainer),
    "sdft": (sdft.SDFTTrainer, self_distillation.SDFTTrainer),
    "gkd": (gkd.GKDTrainer, GKDTrainer),
}
FAMILIES = ("llama", "qwen3")  # with a head of its own, and with one that is tied
WAYS = {
    "ddp": DistributedType.MULTI_CPU,
    "fsdp2": DistributedType.FSDP,
    "tensor parallel": DistributedType.MULTI_GPU,
    "compiled ddp": DistributedType.MULTI_CPU,
}
CASES = [(kind, family, way) for kind in HOSTS for family in FAMILIES for way in WAYS]
# To compile takes seconds, and the trainers that are left out share their code with these.
COMPILED_HOSTS = (("gkd", "llama"), ("sdft", "llama"))
CASES = [case for case in CASES if case[2] != "compiled ddp" or case[:2] in COMPILED_HOSTS]


def trainer(
    kind: str, model: nn.Module, teacher: nn.Module, folder: str, *, ours: bool, **settings: Any
) -> Any:
    """Around a copy of the model, or one that was loaded in shards. The teacher of SDFT is live."""
    host, settings = HOSTS[kind][ours], common(folder) | settings
    if kind == "distillation":
        args = trl.DistillationConfig(**settings, beta=0.5)
        return make(host, model, args, teacher_model=teacher, train_dataset=prompts())
    if kind == "gkd":
        turns = [{"role": "user", "content": "is it"}, {"role": "assistant", "content": "it is"}]
        data = Dataset.from_dict({"messages": [turns] * 4})
        args = gkd.GKDConfig(**settings, max_length=64)
        return make(host, model, args, teacher_model=teacher, train_dataset=data)
    options = {"distillation_mode": "full_logits", "teacher_model_kind": "live"}
    if kind == "sdft":
        data = Dataset.from_dict({"prompt": ["one"] * 4, "privileged_context": ["it is"] * 4})
        args = sdft.SDFTConfig(**settings, **options, num_generations=2)
        return make(host, model, args, train_dataset=data)
    args = sdpo.SDPOConfig(**settings, **options, num_generations=2, distillation_weight=1.0)
    found = make(
        host, model, args, train_dataset=prompts(), reward_funcs=lambda completions, **_: [0.0] * 4
    )
    # As TRL does with the teacher that it would load from the model's name.
    shard = found.is_fsdp_enabled
    found.teacher_model = prepare_fsdp(teacher, found.accelerator) if shard else teacher
    if ours:
        found._teacher_head = head_of(found.teacher_model, check=not shard)
    return found


def loss_of(kind: str, trainer: Any, model: nn.Module, rows: slice, items: float) -> Tensor:
    """The loss of some rows of the batch; `items` tokens are the whole batch's share of a rank."""
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    inputs = {name: value[rows] for name, value in inputs_of(kind).items()}
    if kind == "gkd":
        return trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(items))
    # TRL divides by the number of processes itself.
    inputs["num_items_in_batch"] = torch.tensor(items * trainer.accelerator.num_processes)
    return trainer.compute_loss(model, inputs)


def inputs_of(kind: str) -> dict[str, Tensor]:
    found = batch()
    if kind != "gkd":
        return found
    ids = torch.cat([found["prompt_ids"], found["completion_ids"]], dim=1)
    read = torch.cat([found["prompt_mask"], found["completion_mask"]], dim=1)
    labels = torch.where(read != 0, ids, -100)
    labels[:, :5] = -100
    return {"input_ids": ids, "attention_mask": read, "labels": labels}


TOKENS = 18.0


def ranks(rank: int, folder: str) -> dict[str, Any]:
    """Gradients of our trainers on two ranks, by host, family and way."""
    launched(rank)
    found = {}
    for kind, family, way in CASES:
        with accelerate_state(WAYS[way]):
            found[f"{kind} {family} {way}"] = on_a_rank(rank, kind, family, way, folder)
    return found


def on_a_rank(rank: int, kind: str, family: str, way: str, folder: str) -> dict[str, Tensor]:
    if way == "tensor parallel":
        model, teacher = (
            loaded_in_shards(f"{folder}/{family} {which}", tp_size=2)
            for which in ("student", "teacher")
        )
        ours = trainer(kind, model, teacher.requires_grad_(False), folder, ours=True)
        loss = loss_of(kind, ours, ours.model, slice(4), TOKENS)
    else:
        model = tiny_model(family)
        settings = {"ddp_backend": "gloo"}
        if way == "fsdp2":
            settings |= fsdp2_arguments(type(model.model.layers[0]).__name__)
        if way == "compiled ddp":
            settings |= COMPILED
        ours = trainer(kind, model, neighbour(model), folder, ours=True, **settings)
        ours.model, _ = ours.accelerator.prepare(ours.model, ours.create_optimizer())
        rows = slice(2 * rank, 2 * rank + 2)
        loss = loss_of(kind, ours, ours.model, rows, TOKENS / 2)
    loss.backward()
    found = gradients(ours.model)
    assert all(isinstance(grad, DTensor) for grad in found.values()) == (way == "fsdp2")
    assert any(isinstance(grad, DTensor) for grad in found.values()) == ("ddp" not in way)
    return {"loss": loss.detach(), **whole(found)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    for family in FAMILIES:
        model = tiny_model(family)
        model.save_pretrained(folder / f"{family} student")
        neighbour(model).save_pretrained(folder / f"{family} teacher")
    return in_processes(ranks, str(folder), folder)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family", "way"), CASES)
def test_loss_and_gradients(
    kind: str, family: str, way: str, found: list[dict[str, Any]], tmp_path
) -> None:
    model = tiny_model(family)
    theirs = trainer(kind, model, neighbour(model), str(tmp_path), ours=False)
    loss = loss_of(kind, theirs, theirs.model, slice(4), TOKENS)
    loss.backward()
    expected = gradients(theirs.model)
    ours = [one[f"{kind} {family} {way}"] for one in found]
    mean = torch.stack([one["loss"] for one in ours]).mean()
    torch.testing.assert_close(mean, loss.detach(), rtol=1e-5, atol=1e-6)
    for one in ours:
        assert_close({name: grad for name, grad in one.items() if name != "loss"}, expected)
