"""What a training run may find in its folder, and what it leaves alone there."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import date
from itertools import chain, count
from pathlib import Path

from selfdistill.config import Config, ConfigError, load_config, save_config
from selfdistill.errors import UserError
from selfdistill.runlog import JsonLines
from selfdistill.training.checkpoint import CheckpointStore
from selfdistill.training.solver import recorded_date, with_date
from selfdistill.training.state_file import (
    MAY_DIFFER,
    CheckpointError,
    differing_settings,
    read_state,
)

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
CHECKPOINTS = "checkpoints"


class RunExistsError(UserError):
    """The folder holds a run that nobody asked to continue, or that cannot be continued."""


def refuse_other_run(config: Config, *, resume: bool) -> None:
    """Make sure that training overwrites nothing that it was not asked to continue.

    Args:
        config: the run that wants to start or to go on in `config.output_dir`.
        resume: whether it was asked to go on.

    Raises:
        RunExistsError: the folder holds a run and `resume` is False; or there is no checkpoint to
            go on from and what is there belongs to another run, or to one that had come further.
        LogError: a log cannot be read.
    """
    folder = config.output_dir
    store = CheckpointStore(folder / CHECKPOINTS)
    go_on = f"{folder} already holds a run: resume it (--resume), or choose another output_dir"
    if os.path.lexists(store.last):
        if not resume:
            raise RunExistsError(go_on)
        return
    # Without a checkpoint there is nothing to go on from. A run that was killed before its first
    # one leaves its configuration and the evaluation before training, which it may make again.
    logged = {
        name: [record.get("step", 0) for record in JsonLines(folder / name).read()]
        for name in (METRICS_FILE, EVALUATIONS_FILE)
    }
    step = max((step for steps in logged.values() for step in steps), default=0)
    if step > 0:
        saved = ", ".join(store.saved()) or "no checkpoint"
        raise RunExistsError(
            f"{folder} holds the logs of a run that came to step {step}, but {store.directory} has "
            f"{saved} and no link `last`, so it cannot go on, and another run would erase them: "
            "choose another output_dir, move them away, or put the link back"
        )
    differing = _differing_config(config)
    if differing is not None:
        raise RunExistsError(
            f"{folder / CONFIG_FILE} is that of another run: {differing}. Choose another "
            "output_dir, or move it away"
        )
    if not resume and (store.saved() or any(logged.values())):
        raise RunExistsError(go_on)


def first_day(config: Config) -> date | None:
    """Return the day that the run in the folder writes in its prompts; None where it writes none.

    A run that goes on after midnight keeps the day of its first start.
    """
    folder = config.output_dir
    with suppress(CheckpointError):  # one that is damaged is refused when it is loaded
        return recorded_date(read_state(folder / CHECKPOINTS / "last").config)
    path = folder / CONFIG_FILE
    found = _loaded(path) if path.exists() else None
    return None if found is None else found.prompt.date


def keep_config(config: Config, *, step: int) -> None:
    """Write down the configuration; one that says something else keeps a name of its own.

    A file that says the same is left as it is, comments and all.

    Args:
        config: what the run goes on with.
        step: how far it has come with the one that is there.
    """
    path = config.output_dir / CONFIG_FILE
    if path.exists():
        if _loaded(path) == config:
            return
        name = f"config.until-step-{step:06d}"
        names = chain([name], (f"{name}-{again}" for again in count(2)))
        path.rename(next(p for p in (path.with_name(f"{n}.yaml") for n in names) if not p.exists()))
    save_config(config, path)


def _differing_config(config: Config) -> str | None:
    """Say how the configuration that lies in the folder differs; None when it is the same."""
    path = config.output_dir / CONFIG_FILE
    if not path.exists():
        return None
    found = _loaded(path)
    if found is None:
        return "this version cannot read it"
    if config.prompt.date is None and found.prompt.date is not None:
        config = with_date(config, found.prompt.date)  # as `first_day` will tell
    return differing_settings(
        config.model_dump(mode="json"), found.model_dump(mode="json"), may_differ=MAY_DIFFER
    )


def _loaded(path: Path) -> Config | None:
    try:
        return load_config(path)
    except ConfigError:
        return None
