"""state.json of a checkpoint: what it must hold, and whether it is this run's.

Whoever takes weights out of a checkpoint asks `refuse_other`: a configuration that was edited, a
checkpoint of another run, or other data would change results without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from selfdistill.config import PLACES_OF_ENGINES, Config, ConfigError
from selfdistill.errors import UserError
from selfdistill.json_text import parse_json
from selfdistill.tasks.interface import Task

FORMAT = "selfdistill-checkpoint"
VERSION = 2
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"

# Settings that a continued run may change without becoming another run.
MAY_DIFFER = (
    "model",
    "output_dir",
    "device",
    "shard",
    "attention",
    "steps",
    "max_empty_steps",
    "checkpoint",
    "completions",
    "trackers",
    "report",
)

# A task without end is recognised by this many of its problems.
_SAMPLED = 8


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names it and says why."""


Step = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^[^/\\]+$")]


class StateFile(BaseModel):
    """The document, as it was written; see `TrainState` for the first six fields."""

    model_config = ConfigDict(strict=True, frozen=True)

    format: Literal["selfdistill-checkpoint"]
    version: Literal[2]
    step: Step
    evaluated_step: Step | None
    best_step: Step | None
    best_metric: float | None
    config: dict[str, Any]
    base_sha256: str
    inputs: dict[str, str] = {}
    """Digests of what the configuration only names; older checkpoints have none."""
    optimizer_groups: list[dict[str, Any]]
    sha256: dict[FileName, str]
    """The SHA-256 of every other file."""


def read_state(path: Path) -> StateFile:
    """Return a checkpoint's state.json; the other files are not looked at.

    Raises:
        CheckpointError: missing, torn, or not of this program.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        document = parse_json((path / STATE_FILE).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a checkpoint: it has no {STATE_FILE}") from None
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {path} is torn: {STATE_FILE} cannot be read ({error}). Take another "
            "checkpoint"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of selfdistill ({STATE_FILE} says so)")
    if document.get("version") != VERSION:
        raise CheckpointError(
            f"checkpoint {path} has version {document.get('version')!r:.40}, this program reads "
            f"{VERSION}"
        )
    try:
        state = StateFile.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"checkpoint {path} has a {STATE_FILE} that this program did not write: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r:.80}. "
            "Take another checkpoint"
        ) from error
    missing = {OPTIMIZER_FILE, RNG_FILE} - state.sha256.keys()
    if missing:
        raise CheckpointError(
            f"checkpoint {path} has a {STATE_FILE} without the digest of {min(missing)}: this "
            "program writes one for every file. Take another checkpoint"
        )
    return state


def read_checkpoint(path: Path) -> StateFile:
    """Return a checkpoint's state.json after checking every file against its SHA-256.

    Raises:
        CheckpointError: missing, torn, damaged, or not a checkpoint of this program.
    """
    state = read_state(path)
    for name, digest in state.sha256.items():
        if not (path / name).is_file():
            raise CheckpointError(f"checkpoint {path} is torn: {name} is missing")
        if sha256_of(path / name) != digest:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} has other bytes")
    return state


def refuse_other(
    path: Path,
    state: StateFile,
    *,
    config: Mapping[str, Any] | None = None,
    base_sha256: str | None = None,
    inputs: Mapping[str, str] | None = None,
    may_differ: Iterable[str] = MAY_DIFFER,
) -> None:
    """Make sure that a checkpoint is that of the run at hand.

    Args:
        path: the checkpoint.
        state: what it records.
        config: the configuration at hand, as JSON. None, here and below: it does not matter.
        base_sha256: fingerprint of the base weights at hand.
        inputs: `digest_inputs` at hand.
        may_differ: settings that are not compared.

    Raises:
        CheckpointError: names what differs.
    """
    changes = None
    if config is not None:
        changes = differing_settings(config, state.config, may_differ=may_differ)
    if changes is not None:
        raise CheckpointError(
            f"checkpoint {path} belongs to another configuration: {changes}. Put the settings "
            "back, or take a checkpoint of this run"
        )
    if base_sha256 is not None and state.base_sha256 != base_sha256:
        raise CheckpointError(
            f"checkpoint {path} started from other weights than the configured model holds: set "
            "`model` to those that the run started from"
        )
    for name, digest in (inputs or {}).items():
        recorded = state.inputs.get(name, digest)  # older checkpoints do not know it
        if recorded != digest:
            raise CheckpointError(
                f"checkpoint {path} was trained with other {name} than are there now: put them "
                "back, or start a new run"
            )


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
    config, recorded = _without_places(config), _without_places(recorded)
    names = sorted(
        name
        for name in {*config, *recorded} - set(may_differ)
        if config.get(name) != recorded.get(name)
    )
    return (
        ", ".join(f"{n} ({recorded.get(n)!r} there, {config.get(n)!r} here)" for n in names) or None
    )


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that does not say where its rollouts are drawn."""
    rollout = config.get("rollout")
    engine = rollout.get("engine") if isinstance(rollout, dict) else None
    if not isinstance(engine, dict):
        return dict(config)
    places = PLACES_OF_ENGINES.get(str(engine.get("name")), ())
    kept = {name: value for name, value in engine.items() if name not in places}
    return {**config, "rollout": {**config["rollout"], "engine": kept}}


def digest_inputs(task: Task, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return a digest of all that decides a run's numbers and that its configuration only names.

    Args:
        task: its training and dev problems count; of a task without end the first few. What it
            has read beside them it names itself (`sources`).
        tokenizer: its vocabulary and its chat template count.
    """

    def problems(split: str) -> str:
        size = task.size(split)
        found = task.problems(split=split, count=_SAMPLED if size is None else size)
        return _digest(
            f"{size}", *(part for p in found for part in (p.id, p.question, p.answer, p.reference))
        )

    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True)
    return {
        "training problems": problems("train"),
        "dev problems": problems("dev"),
        "tokens or chat template": _digest(vocabulary, template),
        **getattr(task, "sources", {}),
    }


def refuse_ranks_apart(inputs: Sequence[Mapping[str, str]]) -> None:
    """Make sure that all ranks read the same.

    Args:
        inputs: of each rank, see `digest_inputs`.

    Raises:
        ConfigError: names what differs.
    """
    apart = sorted({name for own in inputs for name in own if own[name] != inputs[0].get(name)})
    if apart:
        raise ConfigError(
            f"the ranks do not read the same {', '.join(apart)}: each runs the task itself, so "
            "what it draws at random needs a seed"
        )


def sha256_of(path: Path) -> str:
    """Return the digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        text = part.encode(errors="surrogatepass")
        digest.update(f"{len(text)} ".encode() + text)  # so that parts cannot run together
    return digest.hexdigest()
