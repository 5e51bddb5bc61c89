"""The student's weights: loading, LoRA adapters, and float32 masters of what training changes.

Bytes per parameter, gradients and AdamW's two moments included (activations not):

    full, float32      16    weight 4, gradient 4, moments 8
    full, bfloat16     18    weight 2, master 4, gradient 4, moments 8
    LoRA, float32       4    and 16 for each adapter parameter
    LoRA, bfloat16      2    and 18 for each adapter parameter

The base teacher of full fine-tuning holds one more copy (4 or 2), with LoRA none. An EMA teacher
holds 4 (float32) or 6 (bfloat16) for each trained parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from selfdistill.config import AdapterConfig, Config
from selfdistill.errors import UserError
from selfdistill.model.float32_sum import sum_embedding_gradients_in_float32
from selfdistill.model.folder import load_causal_lm
from selfdistill.model.sharding import assign
from selfdistill.seeds import derive_seed

if TYPE_CHECKING:
    from peft import PeftModel

# A transformers causal LM, or PEFT's wrapper of one.
Student: TypeAlias = "PreTrainedModel | PeftModel"

ADAPTER_FILE = "adapter_model.safetensors"


class UnsupportedAdapterError(UserError):
    """The adapter configuration asks for layers that cannot be adapted."""


def load_model(config: Config, folder: Path | None = None) -> Student:
    """Load the configured model in its compute dtype, with its adapters.

    Args:
        config: names the base model, the precision and the adapters.
        folder: a checkpoint of this configuration whose weights to take; None: as before training.

    Raises:
        UnusableModelError: see `selfdistill.model.folder.load_causal_lm`.
        UnsupportedAdapterError: see `attach_adapter`.
    """
    source = config.model if folder is None or config.adapter is not None else str(folder)
    dtype = getattr(torch, config.precision)
    model: Student = load_causal_lm(source, dtype=dtype)
    if config.adapter is not None:
        model = attach_adapter(model, config.adapter, seed=derive_seed(config.seed, "adapter"))
        if folder is not None:
            load_adapter(model, folder)
    return model.eval()


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Give a model's adapters the weights of a checkpoint."""
    weights = _adapter_weights(model)
    for name, saved in load_file(folder / ADAPTER_FILE).items():
        weights[name].data.copy_(saved)


def attach_adapter(model: PreTrainedModel, adapter: AdapterConfig, *, seed: int) -> PeftModel:
    """Wrap a model with LoRA adapters that change nothing yet; only they are trained.

    Args:
        model: frozen from now on; so is its lm_head, whose gradient the fused loss then skips.
        adapter: rank, scale and layers.
        seed: of the random half of the adapters.

    Raises:
        UnsupportedAdapterError: there is no such layer, or the lm_head or the embeddings, whose
            gradient the fused loss takes for the frozen ones, would be adapted.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = adapter.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        # Said of experts, whose ranks and scales it does not ignore.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            # The adapters compute in the model's dtype; `TrainedWeights` holds them in float32.
            wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise UnsupportedAdapterError(f"adapter.target_modules {wanted!r}: {error}") from error
    # Names that peft has translated for experts, or that it was not given, are not among these.
    named = [] if isinstance(wanted, str) else wrapped.peft_config["default"].target_modules
    adapted = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    unknown = sorted(n for n in named if not any(f".{a}".endswith(f".{n}") for a in adapted))
    if unknown:
        raise UnsupportedAdapterError(
            f"adapter.target_modules {wanted!r}: the {type(model).__name__} has no linear layer "
            f"{', '.join(unknown)}, expected names of its layers, or 'all-linear'"
        )
    for name, layer in (
        ("lm_head", model.get_output_embeddings()),
        ("embedding", model.get_input_embeddings()),
    ):
        if isinstance(layer, BaseTunerLayer):
            raise UnsupportedAdapterError(
                f"adapter.target_modules {wanted!r} names the {name}, which stays frozen: leave it "
                "out, or use 'all-linear' (every linear layer of the decoder)"
            )
    return wrapped


def adapter_rank(model: Student) -> int | None:
    """Return the largest rank among a model's adapters, which may be more than was configured.

    peft doubles the rank of two layers that a mixture of experts keeps in one parameter. None: the
    model has no adapters.
    """
    configs = getattr(model, "peft_config", {}).values()
    return max((rank for c in configs for rank in (c.r, *c.rank_pattern.values())), default=None)


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
            (config,) = self.model.peft_config.values()
            config.save_pretrained(folder)
            tensors = {_peft_name(n): master.detach() for n, master in masters.items()}
            save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """Return what `save` wrote there, float32, by the names of `masters`; changes nothing."""
        if self.is_whole_model:
            saved = load_causal_lm(str(folder), dtype=torch.float32)
            return {name: parameter.detach() for name, parameter in saved.named_parameters()}
        names = {_peft_name(name): name for name in self.masters}
        return {names.get(n, n): t for n, t in load_file(folder / ADAPTER_FILE).items()}


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


def _peft_name(name: str) -> str:
    """Return a parameter's name in an adapter file, which leaves the adapter's own name out."""
    return name.replace(".default.", ".")


def _adapter_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {_peft_name(n): p for n, p in model.named_parameters() if p.requires_grad}
