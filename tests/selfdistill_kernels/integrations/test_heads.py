"""What a model's head is, and that heads which cannot be read are refused by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from host_models import FAMILIES, tiny_model, with_lora
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from selfdistill_kernels.integrations import (
    Head,
    UnsupportedHeadError,
    fused_head_distillation,
    head_of,
)
from selfdistill_kernels.integrations.heads import HeadValues, last_hidden_states

IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "granite"])
def test_head_gives_the_models_own_logits(family: str) -> None:
    model = tiny_model(family)
    head = head_of(model)
    own = model(input_ids=IDS).logits
    torch.testing.assert_close(head.values.logits(last_hidden_states(model, input_ids=IDS)), own)
    assert head.weight is model.get_output_embeddings().weight
    assert head.tied == model.config.tie_word_embeddings
    assert head.softcap == (4.0 if family == "gemma3" else None)
    assert head.logit_scale == (0.25 if family in ("cohere", "granite") else 1.0)
    assert model.training


def test_head_of_another_model_is_noticed() -> None:
    model = tiny_model("cohere")
    model.model.config.logit_scale = 1.0  # what the head reads; the model multiplies by its own
    with pytest.raises(UnsupportedHeadError, match="does not make its logits by lm_head"):
        head_of(model)
    assert head_of(model, check=False).logit_scale == 1.0


def test_autocast_of_accelerate_is_no_difference() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(tiny_model("llama"))
    head_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        head_of(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_head_with_lora_gives_the_models_own_logits(family: str) -> None:
    model = with_lora(tiny_model(family))
    head = head_of(model)
    hidden = last_hidden_states(model, input_ids=IDS)
    torch.testing.assert_close(head.values.logits(hidden), model(input_ids=IDS).logits)
    assert [(part.a.shape, part.b.shape, part.scale) for part in head.low_rank] == [
        ((4, 32), (300, 4), 1.5)
    ]
    with model.disable_adapter():
        assert head.low_rank == ()


def test_copy_of_the_head_that_peft_trains_is_the_head() -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(tiny_model("llama"), config)
    head = head_of(model)
    assert head.weight.requires_grad
    with model.disable_adapter():
        assert not head.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"use_dora": True}, "is a variant of LoRA"),
        ({"lora_dropout": 0.1}, "has dropout"),
        ({"lora_bias": True}, "has a bias"),
    ],
)
def test_adapters_that_are_more_than_a_product_are_refused(options: dict, problem: str) -> None:
    model = with_lora(tiny_model("llama"), **options)
    with pytest.raises(UnsupportedHeadError, match=problem):
        _ = head_of(model, check=False).low_rank


def test_dropout_is_no_problem_in_evaluation() -> None:
    model = with_lora(tiny_model("llama"), lora_dropout=0.1).eval()
    assert len(head_of(model).low_rank) == 1


def test_prompt_learning_is_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedHeadError, match="prompt learning"):
        head_of(get_peft_model(tiny_model("llama"), config))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_heads_are_refused(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 6)
    layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(UnsupportedHeadError, match=f"{dtype}: quantised heads"):
        _ = Head(layer).weight


def test_layers_that_hide_their_weight_are_refused() -> None:
    class Packed(nn.Module):
        qweight = torch.zeros(3)

    with pytest.raises(UnsupportedHeadError, match="Packed without a weight tensor"):
        _ = Head(Packed()).weight


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One process, which DTensors take for a group."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_model_that_fsdp2_has_sharded_is_refused(mesh: DeviceMesh) -> None:
    model = tiny_model("llama")
    fully_shard(model.lm_head, mesh=mesh)
    with pytest.raises(UnsupportedHeadError, match=r"fully_shard was called on .* its head"):
        head_of(model)
    assert head_of(model, check=False).weight is model.lm_head.weight


def test_lora_on_a_head_in_shards_is_refused(mesh: DeviceMesh) -> None:
    model = with_lora(tiny_model("llama"))
    parallelize_module(model.get_base_model().lm_head, mesh, {"base_layer": ColwiseParallel()})
    with pytest.raises(UnsupportedHeadError, match="'default' is on a head whose weight is a DTe"):
        head_of(model)


def test_two_soft_caps_with_a_head_in_shards_are_refused(mesh: DeviceMesh) -> None:
    weight = distribute_tensor(torch.randn(7, 5), mesh, [Shard(0)])
    hidden = torch.randn(3, 5)
    capped, plain = HeadValues(weight, softcap=4.0), HeadValues(weight)
    with pytest.raises(UnsupportedHeadError, match=r"heads in shards \(DTensors\) need one soft"):
        fused_head_distillation(hidden, hidden, capped, plain)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="got Linear without get_decoder"):
        head_of(nn.Linear(3, 3))


def test_kernels_alone_import_no_host() -> None:
    code = (
        "import sys, selfdistill_kernels, selfdistill_kernels.integrations as i\n"
        "print([m for m in ('transformers', 'peft', 'trl', 'liger_kernel', 'accelerate')"
        " if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
