"""Checkpoints: written whole or not at all, and refused by name when they are damaged.

    checkpoints/
      step-000042/   model.safetensors config.json tokenizer...   (a transformers folder), or
                     adapter_model.safetensors adapter_config.json       (a PEFT folder)
                     optimizer.safetensors rng.safetensors state.json
                     teacher.safetensors          (of a teacher with a state, such as ema)
                     rollouts.json                (drawn for the next step: max_staleness)
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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from selfdistill.model.parts import gather, like
from selfdistill.model.teacher import Teacher
from selfdistill.model.weights import TrainedWeights, copy_tensors
from selfdistill.training.state_file import (
    FORMAT,
    MAY_DIFFER,
    OPTIMIZER_FILE,
    RNG_FILE,
    STATE_FILE,
    VERSION,
    CheckpointError,
    read_checkpoint,
    refuse_other,
    sha256_of,
)

TEACHER_FILE = "teacher.safetensors"
# What `CheckpointStore` writes. A copy under another name, such as step-000042-good, stays.
_STEP_FOLDER = re.compile(r"step-\d{6,}(-evaluated)?")


@dataclass(frozen=True)
class TrainState:
    """What a run knows besides tensors.

    Attributes:
        step: finished optimiser steps.
        evaluated_step: the last step with a held-out evaluation, or None before the first.
        best_step: the step whose held-out `Evaluation.merit` was highest (Avg@k, or the mean reward
            of a task with graded ones), or None before the first evaluation.
        best_metric: that figure, or None.
        config: the run's configuration (`Config.model_dump(mode="json")`).
        base_sha256: fingerprint of the weights that the run started from.
        inputs: `digest_inputs` of the run.
    """

    step: int
    evaluated_step: int | None
    best_step: int | None
    best_metric: float | None
    config: dict[str, Any]
    base_sha256: str
    inputs: dict[str, str] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints folder of one run.

    Args:
        directory: created when the first checkpoint is saved.
        keep: how many of the newest checkpoints stay, beside the best one; None: all of them.
    """

    def __init__(self, directory: Path, *, keep: int | None = 1) -> None:
        self.directory = directory
        self._keep = keep

    @property
    def last(self) -> Path:
        """The newest finished state."""
        return self.directory / "last"

    @property
    def best(self) -> Path:
        """The state of `TrainState.best_step`."""
        return self.directory / "best"

    def save(
        self,
        state: TrainState,
        weights: TrainedWeights,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: torch.optim.Optimizer,
        teacher: Teacher | None = None,
        *,
        files: Mapping[str, str] | None = None,
        writes: bool = True,
    ) -> Path | None:
        """Write one checkpoint, point `last` (and `best`, when it is the best) at it, tidy up.

        With sharded weights all ranks must call this. What is written does not depend on the number
        of ranks, nor on whether the weights were sharded.

        Args:
            state: what the run knows besides tensors.
            weights, tokenizer, optimizer, teacher: of the run.
            files: name and text of what else has to be kept.
            writes: False on the ranks that only hand over their parts.

        Returns:
            The checkpoint's folder; None where nothing was written.

        Raises:
            CheckpointError: the disk refused (full, read-only); earlier checkpoints are intact.
        """
        # All ranks hand over their parts before any of them may leave.
        masters = gather(weights.masters, keep=writes)
        averages = gather(teacher.state, keep=writes) if teacher is not None else {}
        moments, groups = _flatten_optimizer(optimizer)
        tensors = gather(moments, keep=writes)
        if not writes:
            return None
        # Everything is written beside the place where it goes, with a digest of each file in the
        # document that is written last.
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
            save_file(tensors, temporary / OPTIMIZER_FILE)
            save_file(_rng_states(), temporary / RNG_FILE)
            for file, text in (files or {}).items():
                (temporary / file).write_text(text, encoding="utf-8")
            document = {
                "format": FORMAT,
                "version": VERSION,
                **asdict(state),
                "optimizer_groups": groups,
                "sha256": {p.name: sha256_of(p) for p in sorted(temporary.iterdir())},
            }
            (temporary / STATE_FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")
            # Flushed before it gets its name, and named before a link points at it: whatever a
            # crash leaves behind, `last` is whole.
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
        inputs: Mapping[str, str] | None = None,
        teacher: Teacher | None = None,
        may_differ: Iterable[str] = MAY_DIFFER,
    ) -> TrainState:
        """Put the weights, the optimiser's, teacher's and random numbers' states back in place.

        Args:
            path: a checkpoint folder (`last` or `best` of this store, or any other).
            weights: gets the weights.
            optimizer: gets the moments; must hold the same parameters in the same order.
            teacher: gets its state, if it has one.
            config: the configuration of the run that wants to continue.
            base_sha256: fingerprint of the weights that this run starts from.
            inputs: `digest_inputs` of this run; None: whatever they were.
            may_differ: settings of `config` that may differ from the checkpoint's.

        Raises:
            CheckpointError: the checkpoint is missing, torn, damaged, from another program, of
                another configuration, of other inputs or of another model.
        """
        found = read_checkpoint(path)
        refuse_other(
            path,
            found,
            config=config,
            base_sha256=base_sha256,
            inputs=inputs,
            may_differ=may_differ,
        )
        _restore(path, weights.read(path), weights.masters, "another model")
        weights.publish()
        if teacher is not None:
            restore_teacher(path, teacher)
        with _naming(path):
            _restore_optimizer(optimizer, load_file(path / OPTIMIZER_FILE), found.optimizer_groups)
            _restore_rng(load_file(path / RNG_FILE))
        return TrainState(
            **{name: getattr(found, name) for name in TrainState.__dataclass_fields__}
        )

    def go_back(self, *, weights: TrainedWeights, optimizer: torch.optim.Optimizer) -> None:
        """Put the weights and the optimiser's moments of the best checkpoint back in place.

        Everything else (the step, random numbers, the teacher) stays. With sharded weights all
        ranks must call this.

        Args:
            weights, optimizer: of the run that wrote it.

        Raises:
            CheckpointError: the checkpoint is missing, torn, damaged or of another model.
        """
        found = read_checkpoint(self.best)
        _restore(self.best, weights.read(self.best), weights.masters, "another model")
        weights.publish()
        with _naming(self.best):
            moments = load_file(self.best / OPTIMIZER_FILE)
            _restore_optimizer(optimizer, moments, found.optimizer_groups)

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
        if self._keep is None:
            return
        linked = {link.resolve() for link in (self.last, self.best) if link.is_symlink()}
        others = [
            path
            for path in map(self.directory.joinpath, self.saved())
            if path.resolve() not in linked
        ]
        # `last` is one of those that are kept.
        for path in others[: max(0, len(others) - self._keep + 1)]:
            shutil.rmtree(path, ignore_errors=True)


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


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what reading the optimiser's and the generators' files may raise into one error."""
    try:
        yield
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is of another optimiser or random generator: "
            f"{type(error).__name__}: {error}"
        ) from error


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


def _flush(path: Path) -> None:
    """Make a file's or a folder's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
