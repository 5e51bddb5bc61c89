"""A trained checkpoint as a folder that `from_pretrained` and vLLM load, with a card."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from selfdistill.config import Config, load_config
from selfdistill.errors import UserError
from selfdistill.places import PlaceTakenError, try_folder
from selfdistill.runlog import write_atomically
from selfdistill.training.solver import load_checkpoint, load_solver_tokenizer
from selfdistill.training.state_file import StateFile, read_state


class ExportError(UserError):
    """A run that has no such weights, or a place where they cannot go."""


def export(
    run: Path,
    output: Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    form: Literal["merged", "adapter"] = "merged",
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> int:
    """Write weights, tokenizer and a card.

    Args:
        run: a training run's folder.
        output: a new or an empty folder.
        checkpoint: which weights.
        form: "merged" writes a whole model; "adapter" the adapter alone, for PEFT and vLLM's LoRA.
        dtype: of a whole model; by default the precision of the run.

    Returns:
        The step that the weights are of.

    Raises:
        ExportError: the run trained no adapter, and one was asked for.
        PlaceTakenError: the folder holds something.
        CheckpointError: the checkpoint is torn, or that of another configuration.
        UnusableModelError: the base model cannot be loaded.
    """
    if output.exists() and any(output.iterdir()):
        raise PlaceTakenError(f"{output} is not empty: choose another --output")
    config = load_config(run / "config.yaml")
    if form == "adapter" and config.adapter is None:
        raise ExportError(f"{run} trained whole weights and no adapter: export it merged")
    folder = run / "checkpoints" / checkpoint
    model: Any = load_checkpoint(config, folder)
    tokenizer = load_solver_tokenizer(config)
    try_folder(output)
    if form == "merged":
        if config.adapter is not None:
            # In float32, so that only the result is rounded.
            model = model.float().merge_and_unload()
        model = model.to(getattr(torch, dtype or config.precision))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    state = read_state(folder)
    write_atomically(output / "README.md", card(config, state, form=form))
    return state.step


def card(config: Config, state: StateFile, *, form: str) -> str:
    """Return the page of a model: what it is, and how it was trained."""
    # A folder is nothing to anybody else, and the Hub refuses it as a base model.
    on_hub = not Path(config.model).is_dir()
    front = {
        **({"base_model": config.model} if on_hub else {}),
        "library_name": "transformers" if form == "merged" else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["self-distillation", config.method.name],
    }
    changed = config.model_dump(mode="json", exclude={"model", "output_dir"}, exclude_defaults=True)
    settings = _without_folders(_with_names(changed, config.model_dump(mode="json")))
    best = (
        ""
        if state.best_metric is None
        else (
            f" The best held-out value of the run was {state.best_metric:.3f}, at step "
            f"{state.best_step}."
        )
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# {Path(config.model).name}, trained by {config.method.name}\n\n"
        f"Weights after step {state.step} of {config.steps} of `selfdistill train` on the task "
        f"{config.task.name} (arXiv 2606.11173 describes the methods).{best}\n\n"
        "The settings that are not defaults:\n\n"
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n"
    )


def _with_names(changed: Any, whole: Any) -> Any:
    """Return settings with the names of their sections, each of which is the default of its own."""
    if isinstance(changed, dict):
        name = {"name": whole["name"]} if "name" in whole else {}
        return name | {key: _with_names(value, whole[key]) for key, value in changed.items()}
    if isinstance(changed, list):
        return [_with_names(*pair) for pair in zip(changed, whole, strict=True)]
    return changed


def _without_folders(settings: Any) -> Any:
    """Return settings with every path of this machine reduced to its name."""
    if isinstance(settings, dict):
        return {name: _without_folders(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [_without_folders(value) for value in settings]
    # Only where there is something: a prompt or a stop string may begin with a slash, too.
    if isinstance(settings, str) and os.path.isabs(settings) and os.path.exists(settings):
        return Path(settings).name or settings
    return settings


def push(folder: Path, name: str) -> str:
    """Upload an exported folder to the Hugging Face Hub; return its address.

    Args:
        folder: what `export` wrote.
        name: owner/name; a repository that is not there yet becomes a private one.

    Raises:
        ExportError: the Hub refused, or cannot be reached; the folder stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # of the network, of the Hub, or of the name
        raise ExportError(
            f"cannot push {folder} to {name}: {error}. The folder is whole; log in with `hf auth "
            "login`, or upload it with `hf upload`"
        ) from error
    return str(address)
