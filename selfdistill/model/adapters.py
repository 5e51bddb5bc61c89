"""LoRA adapters by peft: attached to a model, saved, and read back.

Loaded only where a run trains adapters, because peft takes its time to import.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from selfdistill.config import AdapterConfig
from selfdistill.errors import UserError

_FILE = "adapter_model.safetensors"


class UnsupportedAdapterError(UserError):
    """The adapter configuration asks for layers that cannot be adapted."""


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


def adapter_rank(model: torch.nn.Module) -> int | None:
    """Return the largest rank among a model's adapters, which may be more than was configured.

    peft doubles the rank of two layers that a mixture of experts keeps in one parameter. None: the
    model has no adapters.
    """
    configs = getattr(model, "peft_config", {}).values()
    return max((rank for c in configs for rank in (c.r, *c.rank_pattern.values())), default=None)


def save_adapter(model: PeftModel, masters: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write a PEFT adapter folder.

    Args:
        model: says how the adapters were made.
        masters: their float32 weights, by the names of the model's parameters.
        folder: exists.
    """
    (config,) = model.peft_config.values()
    config.save_pretrained(folder)
    tensors = {_name_in_file(name): master.detach() for name, master in masters.items()}
    save_file(tensors, folder / _FILE, metadata={"format": "pt"})


def read_adapter(names: Iterable[str], folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of an adapter folder.

    Args:
        names: of the parameters that are expected; what the file has beside them keeps its name.
        folder: what `save_adapter` wrote.
    """
    by_name_in_file = {_name_in_file(name): name for name in names}
    return {by_name_in_file.get(n, n): t for n, t in load_file(folder / _FILE).items()}


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Give a model's adapters the weights of a checkpoint."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, saved in read_adapter(trained, folder).items():
        trained[name].data.copy_(saved)


def _name_in_file(parameter: str) -> str:
    """An adapter file leaves the adapter's own name out."""
    return parameter.replace(".default.", ".")
