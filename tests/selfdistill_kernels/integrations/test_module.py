"""Model and loss in one forward: gradients, autocast, DDP and FSDP2."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from host_models import FAMILIES, assert_close, gradients, neighbour, tiny_model, with_lora
from process_groups import in_two_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.export import Dim, export
from torch.nn.parallel import DistributedDataParallel

from selfdistill_kernels.integrations import ModelWithLoss

GENERATOR = torch.Generator().manual_seed(4)
IDS = torch.randint(3, 300, (4, 10), generator=GENERATOR)
LABELS = IDS.clone()
LABELS[:, :4] = -100
LABELS[1, 8:] = -100
CONTEXT = torch.randint(3, 300, (4, 5), generator=GENERATOR)  # what the teacher alone sees
TEACHER_IDS = torch.cat([CONTEXT, IDS], dim=1)
TEACHER_LABELS = torch.cat([torch.full_like(CONTEXT, -100), LABELS], dim=1)


def materialised(model: nn.Module, teacher: nn.Module, same: bool = True) -> Tensor:
    """The mean forward KL by plain torch; the teacher may see its context."""
    kept = LABELS[:, 1:] != -100
    student = model(input_ids=IDS).logits[:, :-1][kept]
    with torch.no_grad():
        if same:
            target = teacher(input_ids=IDS).logits[:, :-1][kept]
        else:
            target = teacher(input_ids=TEACHER_IDS).logits[:, :-1][TEACHER_LABELS[:, 1:] != -100]
    kl = nn.functional.kl_div(
        student.float().log_softmax(-1), target.float().log_softmax(-1), log_target=True,
        reduction="none",
    )  # fmt: skip
    return kl.sum(-1).mean()


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family: str, same: bool) -> None:
    model = tiny_model(family)
    teacher = neighbour(model)
    expected = materialised(model, teacher, same)
    expected.backward()
    theirs = gradients(model)

    step = ModelWithLoss(model, teacher=teacher)
    context = {} if same else {
        "teacher_inputs": {"input_ids": TEACHER_IDS}, "teacher_labels": TEACHER_LABELS,
    }  # fmt: skip
    output = step({"input_ids": IDS}, LABELS, **context)
    output["loss"].backward()
    torch.testing.assert_close(output["loss"], expected, rtol=1e-5, atol=1e-6)
    assert_close(gradients(model), theirs)
    assert not teacher.training
    assert step.train().model.training
    assert not teacher.training


@pytest.mark.parametrize("kind", ["live", "adapters_off"])
@pytest.mark.parametrize("on_head", [True, False])
def test_teacher_is_the_student_with_more_context(kind: str, on_head: bool) -> None:
    targets = ["lm_head", "q_proj"] if on_head else ["q_proj", "v_proj"]
    model = with_lora(tiny_model("llama"), target_modules=targets)
    same = copy.deepcopy(model)
    teacher = same if kind == "live" else same.unload()
    expected = materialised(model, teacher, same=False)
    expected.backward()
    theirs = gradients(model)
    assert any("lm_head" in name for name in theirs) == on_head

    step = ModelWithLoss(model, teacher=kind)
    output = step({"input_ids": IDS}, LABELS, {"input_ids": TEACHER_IDS}, TEACHER_LABELS)
    output["loss"].backward()
    torch.testing.assert_close(output["loss"], expected, rtol=1e-5, atol=1e-6)
    assert_close(gradients(model), theirs)


def test_bf16_of_accelerate_acts_on_model_and_loss() -> None:
    model = tiny_model("llama")
    teacher = neighbour(model)
    exact = ModelWithLoss(model, teacher=teacher)({"input_ids": IDS}, LABELS)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        expected = ModelWithLoss(model, teacher=teacher)({"input_ids": IDS}, LABELS)["loss"]
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    step = accelerator.prepare(ModelWithLoss(model, teacher=teacher))
    loss = step({"input_ids": IDS}, LABELS)["loss"]
    assert torch.equal(loss, expected)
    assert loss != exact
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize("kind", ["plain", "lora", "lora on the head"])
def test_compiled_with_the_model(kind: str) -> None:
    model = tiny_model("qwen3")
    teacher = neighbour(model)
    if kind != "plain":
        model = with_lora(model, target_modules=["q_proj" if kind == "lora" else "lm_head"])
    step = ModelWithLoss(model, teacher=teacher)
    step({"input_ids": IDS}, LABELS)["loss"].backward()
    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=kind != "lora on the head")
    compiled({"input_ids": IDS}, LABELS)["loss"].backward()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_the_model(strict: bool) -> None:
    model = tiny_model("gemma3")
    step = ModelWithLoss(model, teacher=neighbour(model))
    sizes = {0: Dim("batch", min=2), 1: Dim("time", min=6, max=64)}
    first = ({"input_ids": IDS}, LABELS)
    program = export(step, first, dynamic_shapes=({"input_ids": sizes}, sizes), strict=strict)
    exported = program.module()
    for inputs, labels in (first, ({"input_ids": IDS[:3, :8]}, LABELS[:3, :8])):
        got, expected = exported(inputs, labels), step(inputs, labels)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    expected["loss"].backward()
    theirs = gradients(model)
    model.zero_grad()
    got["loss"].backward()  # its parameters are the model's own
    assert_close(gradients(model), theirs)


def ranks(rank: int, kind: str) -> dict[str, Any]:
    """Two rows of the batch on each rank; the whole batch's tokens are the normaliser."""
    model = tiny_model("llama")
    teacher = neighbour(model)
    step: nn.Module = ModelWithLoss(model, teacher=teacher)
    if kind == "ddp":
        step = DistributedDataParallel(step)
    else:
        for layer in (*model.model.layers, *teacher.model.layers):
            fully_shard(layer)
        fully_shard(step)
    rows = slice(2 * rank, 2 * rank + 2)
    # Both average gradients over ranks, which a normaliser of one rank's share undoes.
    tokens = (LABELS[:, 1:] != -100).sum() / 2
    loss = step({"input_ids": IDS[rows]}, LABELS[rows], normalizer=tokens)["loss"]
    loss.backward()
    return {
        name: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).tolist()
        for name, grad in gradients(model).items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ranks_have_the_gradients_of_one_process(kind: str, tmp_path) -> None:
    model = tiny_model("llama")
    materialised(model, neighbour(model)).backward()
    expected = gradients(model)
    for found in in_two_processes(ranks, kind, tmp_path):
        assert_close({name: torch.tensor(grad) for name, grad in found.items()}, expected)


def test_what_cannot_be_a_teacher_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="teacher: unknown 'frozen'; expected a model or one of"):
        ModelWithLoss(model, teacher="frozen")
    with pytest.raises(ValueError, match="'adapters_off' needs a model that peft has wrapped"):
        ModelWithLoss(model, teacher="adapters_off")
    with pytest.raises(ValueError, match="teacher: has parameters that require a gradient"):
        ModelWithLoss(model, teacher=tiny_model("llama"))
    other = tiny_model("llama", vocab_size=200).requires_grad_(False)
    with pytest.raises(ValueError, match="a vocabulary of 200, expected the student's 300"):
        ModelWithLoss(model, teacher=other)


def test_other_tokens_for_the_teacher_are_refused() -> None:
    step = ModelWithLoss(tiny_model("llama"))
    wrong = TEACHER_LABELS.clone()
    wrong[0, -1] = 7
    with pytest.raises(ValueError, match="teacher_labels: hold other tokens than labels"):
        step({"input_ids": IDS}, LABELS, {"input_ids": TEACHER_IDS}, wrong)
    with pytest.raises(ValueError, match="give both or neither"):
        step({"input_ids": IDS}, LABELS, {"input_ids": TEACHER_IDS})
