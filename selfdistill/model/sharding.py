"""FSDP2: weights, gradients and optimiser states spread over the ranks.

Each rank keeps one part of every tensor. A layer's weights are gathered when it is called and
dropped behind it, its gradients are summed over the ranks as soon as they exist; the optimiser
changes the parts. Trained weights are float32, and are rounded to the compute dtype as they are
gathered. Bytes per parameter on each of R ranks, where e is 4 or 2 for float32 or bfloat16:

    full       16 / R  + e for the copy that samples
    LoRA        e / R  + e, and 16 / R + e for each adapter parameter
    teacher    base: e / R (LoRA: none); ema: 4 / R for each trained parameter, LoRA: and e / R

What is outside of the layers (embeddings, norm, head) stays gathered until the backward pass ends,
the teacher's too. Before anything is divided each rank holds the whole models: student, teacher
and the copy that samples.

Sampling reads whole weights token by token, and every rank ends after another number of tokens: a
copy of the model, which follows after every step, samples without any communication.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from selfdistill.errors import UserError


def shard(root: nn.Module, models: Iterable[nn.Module], *, compute_dtype: torch.dtype) -> None:
    """Spread the models inside a module over all ranks, in place.

    From now on they may only be called through `root`, on all ranks equally often.

    Args:
        root: contains the models.
        models: transformers models or PEFT wrappers; no two of them share a parameter. Every layer
            of them is gathered on its own, what is outside of the layers with `root`.
        compute_dtype: what the models are in, and what gathered weights are rounded to; the
            trained ones become float32 and stay so in parts.

    Raises:
        UnshardableModelError: a model does not say what its layers are, or has parameters of a
            single number.
    """
    for name, parameter in root.named_parameters():
        if parameter.dim() == 0:
            raise UnshardableModelError(
                f"shard: {name} is a single number, which cannot be spread over ranks: set shard: "
                "false"
            )
    device = next(root.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    layers = [layer for model in models for layer in layers_of(model)]
    for module in (*layers, root):
        # One layer at a time, so that the float32 weights never exist as a whole.
        for parameter in module.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
        # The sum, not the mean: every rank divides by the tokens of all of them.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


class UnshardableModelError(UserError):
    """The weights of a model cannot be spread over ranks."""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that transformers never splits over devices: the decoder's layers."""
    classes = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    found = [(n, m) for n, m in model.named_modules() if type(m).__name__ in classes]
    names = {name for name, _ in found}
    # One inside another would be gathered twice.
    layers = [m for n, m in found if not any(n.startswith(f"{outer}.") for outer in names)]
    if not layers:
        raise UnshardableModelError(
            f"{type(model).__name__} does not say what its layers are (_no_split_modules), so its "
            "weights could only be gathered all at once: set shard: false"
        )
    return layers
