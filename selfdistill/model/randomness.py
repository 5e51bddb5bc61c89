"""Nothing in a forward pass may be random.

Dropout and router noise would make student and teacher disagree at random, and activation
checkpointing would replay a layer with other random numbers than the pass had. So models compute in
eval mode, where transformers switches all of it off; what is random all the same is refused by
name: first its configuration is read, then the model is asked.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from selfdistill.model.attention import UnsupportedModelError
from selfdistill_kernels.integrations.heads import causal_lm

# Dropout of heads that a causal LM does not have.
_OTHER_HEADS = ("classifier", "summary")


class RandomModelError(UnsupportedModelError):
    """A forward pass of the model depends on random numbers."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model and all its parts in eval mode for a while; each part gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations.

    transformers does so only for layers in train mode. The layers alone get that mode: whatever
    drops or adds noise inside them stays in eval mode, so the numbers stay the same.
    """
    base: PreTrainedModel = causal_lm(model)
    # transformers 5.2x renamed it.
    enable = getattr(base, "activation_checkpointing_enable", None)
    enable = enable or base.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})
    model.eval()
    for module in base.modules():
        if _recomputes(module):
            module.training = True


def check_not_random(model: nn.Module) -> None:
    """Raise when the configuration of a model, or a module, makes its passes random.

    Dropout is refused whatever the mode: layers that drop by themselves need train mode for
    activation checkpointing. Router noise is refused where its module is in train mode.

    Raises:
        RandomModelError: names the configuration field, or the module, and its value.
    """
    base: PreTrainedModel = causal_lm(model)
    configs = dict(_configs("config", base.get_decoder().config))
    configs |= {f"peft_config[{k!r}]": v for k, v in getattr(model, "peft_config", {}).items()}
    trains = any(module.training and not _recomputes(module) for module in base.modules())
    for owner, config in configs.items():
        for name, value in vars(config).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or value <= 0 or name.startswith(_OTHER_HEADS):
                continue
            if "drop" in name:
                raise RandomModelError(
                    f"{owner}.{name} is {value}, expected 0: dropout in either pass makes student "
                    "and teacher disagree at random; set it to 0 in the model's configuration "
                    "(config.json of its folder) before loading it"
                )
            if "jitter" in name and trains:
                raise RandomModelError(
                    f"{owner}.{name} is {value} and the model is in train mode, expected eval mode "
                    "or 0: noise in the router makes student and teacher disagree at random; call "
                    "model.eval(), and enable_activation_checkpointing of this module for "
                    "checkpointing, which does not need train mode"
                )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0.0:
            raise RandomModelError(
                f"{name} is {module.p}, expected 0: dropout in either pass makes student and "
                "teacher disagree at random; set it to 0 before loading the model"
            )


@torch.no_grad()
def refuse_random_passes(model: nn.Module) -> None:
    """Run a short pass of the model as it will train, and raise when it takes random numbers.

    Raises:
        RandomModelError: names the innermost module that takes them.
    """
    check_not_random(model)
    base: PreTrainedModel = causal_lm(model)
    decoder = base.get_decoder()
    vocabulary = base.get_input_embeddings().num_embeddings
    ids = torch.arange(1, 5, device=decoder.device)[None] % vocabulary
    names = {module: name for name, module in base.named_modules()}
    entered: list[tuple[nn.Module, Any]] = []
    culprits: list[str] = []

    def enter(module: nn.Module, *_: Any) -> None:
        entered.append((module, _random_states()))

    def leave(module: nn.Module, *_: Any) -> None:
        before = entered.pop()[1]
        if not culprits and not _same(before, _random_states()):
            culprits.append(f"{names.get(module) or 'the model'}, a {type(module).__name__}")

    handles = [m.register_forward_pre_hook(enter) for m in decoder.modules()]
    handles += [m.register_forward_hook(leave) for m in decoder.modules()]
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            decoder(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        random.setstate(states[0])
        np.random.set_state(states[1])
    if culprits:
        raise RandomModelError(
            f"{culprits[0]} takes random numbers in a forward pass of the {type(base).__name__}, "
            "expected none: student and teacher would disagree at random. Which setting of its "
            f"config is it? Set that to 0: {_suspects(decoder.config) or 'see its class'}"
        )


def _recomputes(module: nn.Module) -> bool:
    return bool(getattr(module, "gradient_checkpointing", False))


def _configs(owner: str, config: PretrainedConfig) -> Iterator[tuple[str, PretrainedConfig]]:
    """Yield a configuration and those inside it (DBRX and MPT have one for their attention)."""
    yield owner, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _configs(f"{owner}.{name}", value)


def _suspects(config: PretrainedConfig) -> str:
    found = [
        f"{owner}.{name} {value}"
        for owner, part in _configs("config", config)
        for name, value in vars(part).items()
        if any(word in name for word in ("drop", "jitter", "noise", "random")) and value
    ]
    return ", ".join(found)


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0)
    numpy_state = pickle.dumps(np.random.get_state(legacy=False))  # its repr takes milliseconds
    return torch.get_rng_state(), cuda, random.getstate(), numpy_state


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )
