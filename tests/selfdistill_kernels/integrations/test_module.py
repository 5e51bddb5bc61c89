"""Model and loss in one forward: gradients, autocast, DDP and FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from exactness import assert_no_worse_than_torch
from host_models import FAMILIES, assert_close, gradients, neighbour, tiny_model, with_lora
from process_groups import in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
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


@pytest.mark.parametrize("same", [True, False])
def test_models_in_bfloat16(same: bool) -> None:
    """Against materialised logits of the same models, which are rounded to bfloat16."""
    model = tiny_model("llama").to(torch.bfloat16)
    teacher = neighbour(model)
    context = () if same else ({"input_ids": TEACHER_IDS}, TEACHER_LABELS)

    def ours() -> Tensor:
        step = ModelWithLoss(model, teacher=teacher)
        return step({"input_ids": IDS}, LABELS, *context)["loss"]

    found = [loss_and_gradients(ours, model)]
    found.append(loss_and_gradients(lambda: materialised(model, teacher, same), model))
    model, teacher = model.float(), teacher.float()
    found.append(loss_and_gradients(lambda: materialised(model, teacher, same), model))
    assert_no_worse_than_torch("loss", *(loss for loss, _ in found))
    assert_no_worse_than_torch("gradients", *(grads for _, grads in found))


def loss_and_gradients(compute: Callable[[], Tensor], model: nn.Module) -> Any:
    loss = compute()
    loss.backward()
    return loss.detach(), gradients(model)


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
    for found in in_processes(ranks, kind, tmp_path):
        assert_close({name: torch.tensor(grad) for name, grad in found.items()}, expected)


COLUMNS = ["mlp.gate_proj", "mlp.up_proj"]
ROWS = ["mlp.down_proj"]
# Of Llama only: the others normalise queries and keys with a weight whose gradient is each rank's
# own part where heads lie on several.
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


def plan_of(family: str, output: Placement | None) -> dict[str, ParallelStyle]:
    """Tensor parallelism of the body and, last, of the head."""
    has_attention = family == "llama"
    columns = [*COLUMNS, *ATTENTION] if has_attention else COLUMNS
    rows = [*ROWS, "self_attn.o_proj"] if has_attention else ROWS
    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        **{f"model.layers.*.{name}": ColwiseParallel() for name in columns},
        **{f"model.layers.*.{name}": RowwiseParallel() for name in rows},
        "lm_head": ColwiseParallel(output_layouts=output),
    }


def in_tensor_parallel(model: Any, mesh: DeviceMesh, output: Placement | None) -> None:
    """Shard a model; where its head is tied to its embedding, parallelize_module makes two
    parameters of one, both with rows of the vocabulary."""
    parallelize_module(model, mesh, plan_of(model.config.model_type, output))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def vocabulary_ranks(rank: int, family: str) -> dict[str, dict[str, Any]]:
    """Gradients with tensor parallelism of body and head: of two ranks, then of two such pairs,
    which have two rows of the batch each and FSDP2 between them."""
    found = {}
    for name, pairs in (("pair", 1), ("pairs", 2)):
        if dist.get_world_size() != 2 * pairs:
            continue
        mesh = init_device_mesh("cpu", (pairs, 2), mesh_dim_names=("data", "tensor"))
        for output in (None, Replicate()):
            model = tiny_model(family)
            teacher = neighbour(model)
            for each in (model, teacher):
                in_tensor_parallel(each, mesh["tensor"], output)
            step: nn.Module = ModelWithLoss(model, teacher=teacher)
            if pairs > 1:
                for layer in (*model.model.layers, *teacher.model.layers):
                    fully_shard(layer, mesh=mesh["data"])
                fully_shard(step, mesh=mesh["data"])
            share = 4 // pairs
            rows = slice(share * (rank // 2), share * (rank // 2) + share)
            tokens = (LABELS[:, 1:] != -100).sum() / pairs
            step({"input_ids": IDS[rows]}, LABELS[rows], normalizer=tokens)["loss"].backward()
            found[f"{name} {output}"] = {
                key: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).tolist()
                for key, grad in gradients(model).items()
            }
    return found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_ranks_have_the_gradients_of_one_process(
    family: str, ranks: int, tmp_path
) -> None:
    model = tiny_model(family)
    materialised(model, neighbour(model)).backward()
    expected = gradients(model)
    for each in in_processes(vocabulary_ranks, family, tmp_path, ranks=ranks):
        assert len(each) == 2
        for found in each.values():
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
