"""Reads data sets of the Hugging Face Hub, and of folders that the datasets library can read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from selfdistill.config import HubTaskConfig
from selfdistill.tasks.interface import TaskError
from selfdistill.tasks.rows import Row, WrittenFloat

INSTALL_DATASETS = "pip install 'datasets>=3'"


def hub_rows(config: HubTaskConfig, split: str) -> Iterator[Row]:
    """Yield the rows of one split of a data set, from the Hub, its cache, or a local folder.

    Raises:
        TaskError: the datasets library is missing, or cannot find or read the split.
    """
    try:
        import datasets
    except ImportError as error:
        raise TaskError(f"the hub task needs the datasets library: {INSTALL_DATASETS}") from error
    failures = (OSError, ValueError, RecursionError, datasets.exceptions.DatasetsError)
    try:
        rows = _load(config, split)
    except TaskError:
        raise
    except failures as error:
        raise TaskError(
            f"task.path: the datasets library cannot load split {split!r} of {config.path!r}: "
            f"{_reason(error)}\nWithout a network, save the data set where there is one "
            "(datasets.load_dataset(...).save_to_disk(folder)) and give that folder as task.path."
        ) from error
    wanted = {config.question, config.answer, config.reference, config.id, *config.where}
    if rows.column_names is not None:  # wide columns that nobody asked for are never read
        rows = rows.select_columns([name for name in rows.column_names if name in wanted])
    narrow = _narrow_floats(rows.features or {})
    number = -1
    try:
        for number, fields in enumerate(rows):
            yield Row(_as_written(fields, narrow), f"{config.path}, split {split}, row {number}")
    except TaskError:  # of whoever reads the rows
        raise
    except failures as error:
        raise TaskError(
            f"{config.path}, split {split}: the datasets library cannot read what follows row "
            f"{number} ({_reason(error)}); mend the file there"
        ) from error


def _load(config: HubTaskConfig, split: str) -> Any:
    import datasets

    folder = Path(config.path)
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_dataset(
            config.path,
            config.config,
            split=split,
            revision=config.revision,
            streaming=config.streaming,
        )
    loaded = datasets.load_from_disk(str(folder))
    # A single saved Dataset knows the name of its split.
    found = loaded if isinstance(loaded, dict) else {str(loaded.split): loaded}
    if split not in found:
        raise TaskError(f"task.splits: {folder} has no split {split!r}, only {', '.join(found)}")
    return found[split]


def _reason(error: BaseException) -> str:
    """Return what went wrong in one line; the library tells it in the cause of its error."""
    told = error.__cause__ or error
    return " ".join(str(told).split()) or type(told).__name__


def _narrow_floats(features: dict[str, Any]) -> dict[str, Any]:
    """Return the numpy type of each column of floats with fewer digits than Python's."""
    types = {"float16": np.float16, "float32": np.float32}
    dtypes = {name: getattr(feature, "dtype", None) for name, feature in features.items()}
    return {name: types[dtype] for name, dtype in dtypes.items() if dtype in types}


def _as_written(fields: dict[str, Any], narrow: dict[str, Any]) -> dict[str, Any]:
    """Return a row in which a float32 0.1 is 0.1, and not 0.10000000149011612."""
    return {
        name: WrittenFloat(str(narrow[name](value)))
        if name in narrow and isinstance(value, float)
        else value
        for name, value in fields.items()
    }
