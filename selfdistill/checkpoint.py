"""Checkpoints that are whole or absent, and that are refused by name when they are neither.

    checkpoints/
      step-000042/   model.safetensors config.json tokenizer...   (a transformers folder), or
                     adapter_model.safetensors adapter_config.json       (a PEFT folder)
                     optimizer.safetensors rng.safetensors state.json
                     teacher.safetensors          (of a teacher with a state, such as ema)
      last -> step-000042
      best -> step-000030

The weights are the float32 masters. The data position and the seeds of the rollouts follow from the
step, so neither has a state of its own.

A step folder is written under a temporary name, flushed to the disk and renamed; then `last` and
`best`, symbolic links, are replaced in one system call each. state.json carries the SHA-256 of
every other file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from selfdistill.config import Config
from selfdistill.sharding import gather, like
from selfdistill.teacher import Teacher
from selfdistill.weights import TrainedWeights, copy_tensors

FORMAT = "selfdistill-checkpoint"
VERSION = 2
TEACHER_FILE = "teacher.safetensors"
# What `CheckpointStore` writes. A copy under another name, such as step-000042-good, stays.
_STEP_FOLDER = re.compile(r"step-\d{6,}(-evaluated)?")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class TrainState:
    """What a run knows besides tensors.

    Attributes:
        step: finished optimiser steps.
        evaluated_step: the last step with a held-out evaluation, or None before the first.
        best_step: the step whose held-out Avg@k was highest, or None before the first evaluation.
        best_metric: that Avg@k, or None.
        config: the run's configuration (`Config.model_dump(mode="json")`).
        base_sha256: fingerprint of the weights that the run started from.
    """

    step: int
    evaluated_step: int | None
    best_step: int | None
    best_metric: float | None
    config: dict[str, Any]
    base_sha256: str


class CheckpointStore:
    """The checkpoints folder of one run.

    Args:
        directory: created when the first checkpoint is saved.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def last(self) -> Path:
        """The newest finished state."""
        return self.directory / "last"

    @property
    def best(self) -> Path:
        """The state with the best held-out Avg@k."""
        return self.directory / "best"

    def save(
        self,
        state: TrainState,
        weights: TrainedWeights,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        teacher: Teacher | None = None,
        *,
        writes: bool = True,
    ) -> Path | None:
        """Write one checkpoint, point `last` (and `best`, when it is the best) at it, tidy up.

        With sharded weights all ranks must call this. What is written does not depend on the number
        of ranks, nor on whether the weights were sharded.

        Args:
            state: what the run knows besides tensors.
            weights, tokenizer, optimizer, teacher: of the run.
            writes: False on the ranks that only hand over their parts.

        Returns:
            The checkpoint's folder; None where nothing was written.

        Raises:
            CheckpointError: the disk refused (full, read-only); earlier checkpoints are intact.
        """
        masters = gather(weights.masters, keep=writes)
        averages = gather(teacher.state, keep=writes) if teacher is not None else {}
        moments, groups = _flatten_optimizer(optimizer)
        tensors = gather(moments, keep=writes)
        if not writes:
            return None
        name = self._free_name(state.step)
        temporary = self.directory / f".writing-{name}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            weights.save(temporary, masters)
            if weights.is_whole_model:
                tokenizer.save_pretrained(temporary)
            if averages:
                save_file(averages, temporary / TEACHER_FILE)
            save_file(tensors, temporary / "optimizer.safetensors")
            save_file(_rng_states(), temporary / "rng.safetensors")
            document = {
                "format": FORMAT,
                "version": VERSION,
                **asdict(state),
                "optimizer_groups": groups,
                "sha256": {p.name: _sha256(p) for p in sorted(temporary.iterdir())},
            }
            (temporary / "state.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
            for path in [*temporary.iterdir(), temporary]:
                _flush(path)
            shutil.rmtree(self.directory / name, ignore_errors=True)
            os.rename(temporary, self.directory / name)
            self._point(self.last, name)
            if state.best_step == state.step:
                self._point(self.best, name)
            _flush(self.directory)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"cannot write checkpoint {self.directory / name}: {error}. "
                "Earlier checkpoints are intact; make room or fix the folder, then resume."
            ) from error
        self._tidy()
        return self.directory / name

    def load(
        self,
        path: Path,
        *,
        weights: TrainedWeights,
        optimizer: torch.optim.Optimizer,
        config: dict[str, Any],
        base_sha256: str,
        teacher: Teacher | None = None,
        may_differ: Iterable[str] = (),
    ) -> TrainState:
        """Put the weights, the optimiser's, teacher's and random numbers' states back in place.

        Args:
            path: a checkpoint folder (`last` or `best` of this store, or any other).
            weights: gets the weights.
            optimizer: gets the moments; must hold the same parameters in the same order.
            teacher: gets its state, if it has one.
            config: the configuration of the run that wants to continue.
            base_sha256: fingerprint of the weights that this run starts from.
            may_differ: settings of `config` that may differ from the checkpoint's.

        Raises:
            CheckpointError: the checkpoint is missing, torn, damaged, from another program, of
                another configuration or of another model.
        """
        document = read_checkpoint(path)
        state = TrainState(**{name: document[name] for name in TrainState.__dataclass_fields__})
        changes = differing_settings(config, state.config, may_differ=may_differ)
        if changes is not None:
            raise CheckpointError(f"checkpoint {path} belongs to another configuration: {changes}")
        if state.base_sha256 != base_sha256:
            raise CheckpointError(
                f"checkpoint {path} started from other weights than {config.get('model')!r} holds"
            )
        _restore(path, weights.read(path), weights.masters, "another model")
        weights.publish()
        if teacher is not None:
            restore_teacher(path, teacher)
        _restore_optimizer(
            optimizer, load_file(path / "optimizer.safetensors"), document["optimizer_groups"]
        )
        _restore_rng(load_file(path / "rng.safetensors"))
        return state

    def saved(self) -> list[str]:
        """Return the names of the step folders, the oldest first; others are not ours."""
        if not self.directory.is_dir():
            return []
        return sorted(p.name for p in self.directory.iterdir() if _STEP_FOLDER.fullmatch(p.name))

    def _free_name(self, step: int) -> str:
        """Return a folder name for this step that no link points at.

        A step is saved again when its evaluation was interrupted and made up for later. Were its
        folder removed first, a crash in between would leave `last` pointing at nothing.
        """
        name = f"step-{step:06d}"
        used = {link.resolve().name for link in (self.last, self.best) if link.is_symlink()}
        return f"{name}-evaluated" if name in used else name

    def _point(self, link: Path, name: str) -> None:
        temporary = link.with_name(f".{link.name}.new")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        os.replace(temporary, link)

    def _tidy(self) -> None:
        keep = {link.resolve() for link in (self.last, self.best) if link.is_symlink()}
        for name in self.saved():
            path = self.directory / name
            if path.resolve() not in keep:
                shutil.rmtree(path, ignore_errors=True)


def differing_settings(
    config: Mapping[str, Any], recorded: Mapping[str, Any], *, may_differ: Iterable[str] = ()
) -> str | None:
    """Say which settings of two configurations differ, and how; None when none does.

    Args:
        config: the one at hand, as JSON.
        recorded: the one that was written down. What an older version did not know yet has its
            default.
        may_differ: settings that are not compared.
    """
    with suppress(ValidationError):  # it has what this version does not know: that will be said
        recorded = Config.model_validate(recorded).model_dump(mode="json")
    names = sorted(
        name
        for name in {*config, *recorded} - set(may_differ)
        if config.get(name) != recorded.get(name)
    )
    return (
        ", ".join(f"{n} ({recorded.get(n)!r} there, {config.get(n)!r} here)" for n in names) or None
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json after checking every file against its SHA-256.

    Raises:
        CheckpointError: missing, torn, damaged, or not a checkpoint of this program.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: it has no state.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path} is torn: state.json: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of selfdistill (state.json says so)")
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has version {document.get('version')}, this program reads {VERSION}"
        )
    for name, digest in document["sha256"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"checkpoint {path} is torn: {name} is missing")
        if _sha256(path / name) != digest:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} has other bytes")
    return document


def recorded_config(path: Path) -> dict[str, Any]:
    """Return the configuration that a checkpoint records, empty where there is none to be read.

    Nothing is checked: that is for `read_checkpoint`.
    """
    try:
        config = json.loads((path / "state.json").read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return config if isinstance(config, dict) else {}


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and bytes of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # Flat, because a single number has no bytes to look at (Apertus has such parameters).
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _flatten_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Split an optimiser's state into tensors ("<parameter>.<name>") and JSON."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, values in state["state"].items()
        for name, value in values.items()
    }
    return tensors, state["param_groups"]


def restore_teacher(path: Path, teacher: Teacher) -> None:
    """Give a teacher the state that it had in a checkpoint (an EMA's average); others have none.

    Raises:
        CheckpointError: the checkpoint has no such state, or that of another model.
    """
    if not teacher.state:
        return
    if not (path / TEACHER_FILE).exists():
        raise CheckpointError(f"checkpoint {path} has no state of an {teacher.name} teacher")
    saved = load_file(path / TEACHER_FILE)
    _restore(path, saved, teacher.state, f"another {teacher.name} teacher")
    teacher.publish()


def _restore(
    path: Path,
    source: Mapping[str, torch.Tensor],
    target: Mapping[str, torch.Tensor],
    other: str,
) -> None:
    try:
        copy_tensors(source, target)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is of {other}: {error}") from error


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    groups: list[dict[str, Any]],
) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        moment = like(parameter, value) if value.shape == parameter.shape else value
        state.setdefault(int(index), {})[name] = moment
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _rng_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Make a file's or a folder's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
