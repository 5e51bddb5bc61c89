"""The student's weights: loading, and float32 masters of what training changes.

Bytes per parameter, gradients and AdamW's two moments included (activations not):

    full, float32      16    weight 4, gradient 4, moments 8
    full, bfloat16     18    weight 2, master 4, gradient 4, moments 8
    LoRA, float32       4    and 16 for each adapter parameter
    LoRA, bfloat16      2    and 18 for each adapter parameter

The base teacher of full fine-tuning holds one more copy (4 or 2), with LoRA none. An EMA teacher
holds 4 (float32) or 6 (bfloat16) for each trained parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from transformers import PreTrainedModel

from selfdistill.config import Config
from selfdistill.model.float32_sum import sum_embedding_gradients_in_float32
from selfdistill.model.folder import load_causal_lm
from selfdistill.model.parts import assign
from selfdistill.seeds import derive_seed

if TYPE_CHECKING:
    from peft import PeftModel

# A transformers causal LM, or PEFT's wrapper of one.
Student: TypeAlias = "PreTrainedModel | PeftModel"


def load_model(config: Config, folder: Path | None = None) -> Student:
    """Load the configured model in its compute dtype, with its adapters.

    Args:
        config: names the base model, the precision and the adapters.
        folder: a checkpoint of this configuration whose weights to take; None: as before training.

    Raises:
        UnusableModelError: see `selfdistill.model.folder.load_causal_lm`.
        UnsupportedAdapterError: see `selfdistill.model.adapters.attach_adapter`.
    """
    source = config.model if folder is None or config.adapter is not None else str(folder)
    dtype = getattr(torch, config.precision)
    model: Student = load_causal_lm(source, dtype=dtype)
    if config.adapter is not None:
        from selfdistill.model.adapters import attach_adapter, load_adapter

        model = attach_adapter(model, config.adapter, seed=derive_seed(config.seed, "adapter"))
        if folder is not None:
            load_adapter(model, folder)
    return model.eval()


class TrainedWeights:
    """What the optimiser changes, in float32 whatever the model computes in.

    A float32 parameter is its own master. One of another dtype has a float32 master, to which its
    gradient moves as soon as a backward pass has finished it: gradients add up over passes in
    float32, and only one parameter's gradient exists in half precision at a time. Embeddings add up
    their rows' gradients in float32 within a pass, too (`selfdistill.model.float32_sum`).

    Args:
        model: with `requires_grad` set on the parameters that learn.

    Attributes:
        model: the model.
        masters: the float32 parameters by name, for the optimiser and for gradient clipping.
    """

    def __init__(self, model: Student) -> None:
        self.model = model
        sum_embedding_gradients_in_float32(model)
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p if p.dtype == torch.float32 else torch.nn.Parameter(p.detach().float())
            for name, p in self._parameters.items()
        }
        for name, parameter in self._parameters.items():
            master = self.masters[name]
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(partial(_move_gradient, master))

    @property
    def is_whole_model(self) -> bool:
        """False when adapters are trained only."""
        return not hasattr(self.model, "peft_config")

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model, after the optimiser or a checkpoint changed them."""
        for name, parameter in self._parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    def save(self, folder: Path, masters: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the masters: a PEFT adapter folder, or a transformers folder of the whole model.

        Args:
            folder: exists.
            masters: whole ones, where `self.masters` are in parts.
        """
        masters = self.masters if masters is None else masters
        if self.is_whole_model:
            by_parameter = {id(self._parameters[n]): master for n, master in masters.items()}
            state = {
                name: by_parameter.get(id(tensor), tensor).detach()
                for name, tensor in self.model.state_dict(keep_vars=True).items()
            }
            self.model.save_pretrained(folder, state_dict=state)
        else:
            from selfdistill.model.adapters import save_adapter

            save_adapter(self.model, masters, folder)

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return what `save` wrote there, float32, by the names of `masters`; changes nothing."""
        if self.is_whole_model:
            saved = load_causal_lm(str(folder), dtype=torch.float32)
            return {name: parameter.detach() for name, parameter in saved.named_parameters()}
        from selfdistill.model.adapters import read_adapter

        return read_adapter(self.masters, folder)


def copy_tensors(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    """Copy whole tensors by name into tensors that stay where they are, in parts or not.

    Raises:
        ValueError: the names or the shapes are not the same; nothing was copied.
    """
    wrong = sorted(
        name
        for name in {*source, *target}
        if name not in source or name not in target or source[name].shape != target[name].shape
    )
    if wrong:
        raise ValueError(", ".join(wrong[:5]))
    for name, tensor in target.items():
        assign(tensor, source[name])


@torch.no_grad()
def _move_gradient(master: torch.nn.Parameter, parameter: torch.Tensor) -> None:
    assert parameter.grad is not None  # the hook runs after a gradient was accumulated
    if master.grad is None:
        master.grad = parameter.grad.float()
    else:
        master.grad += parameter.grad
    parameter.grad = None
