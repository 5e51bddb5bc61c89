"""Figures of a run for experiment trackers, by accelerate; loaded where one is configured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from selfdistill.config import Config, ConfigError, TrackerConfig
from selfdistill.errors import UserError
from selfdistill.runlog import JsonLines


class TrackerError(UserError):
    """A tracker that is not installed, or that does not start."""


@contextmanager
def following(config: Config, logs: Mapping[str, JsonLines]) -> Iterator[None]:
    """Start the configured trackers, hand them every record that is logged, end them with the run.

    Args:
        config: of the run, which they note down.
        logs: each under the word that its figures are called by.

    Raises:
        ConfigError: accelerate knows no such tracker.
        TrackerError: it is not installed, or does not start.
    """
    try:
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ImportError as error:
        raise TrackerError(f"trackers need accelerate ({error}): pip install accelerate") from error
    # Trackers ask it which process they are in; a group of processes that exists is left alone.
    PartialState(cpu=config.device != "cuda")
    trackers: list[Any] = []
    try:
        for settings in config.trackers:
            if settings.name not in LOGGER_TYPE_TO_CLASS:
                raise ConfigError(
                    f"trackers: there is no {settings.name!r}, expected one of accelerate's: "
                    f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
                )
            trackers.append(_start(LOGGER_TYPE_TO_CLASS[settings.name], settings, config))
        for word, log in logs.items():
            log.follower = partial(_hand_on, trackers, word)
        yield
    finally:
        for log in logs.values():
            log.follower = None
        for tracker in trackers:
            tracker.finish()


def _start(kind: Any, settings: TrackerConfig, config: Config) -> Any:
    places = [config.output_dir / settings.name] if kind.requires_logging_directory else []
    try:
        tracker = kind(settings.project, *places, **settings.options)
        if hasattr(tracker, "start"):  # older ones start when they are made
            tracker.start()
        tracker.store_init_configuration(dict(_settings(config.model_dump(mode="json"))))
    except Exception as error:  # a program of somebody else, which may want a network
        raise TrackerError(
            f"trackers: {settings.name} does not start ({type(error).__name__}: {error}). Is it "
            f"installed (pip install {settings.name}), and are its `options` right?"
        ) from error
    return tracker


def _hand_on(trackers: Sequence[Any], word: str, record: Mapping[str, Any]) -> None:
    values = dict(_numbers(record, word))
    for tracker in trackers:
        tracker.log(values, step=record["step"])


def _numbers(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            # An interval is its value.
            if "value" in value and isinstance(value["value"], (int, float)):
                yield f"{prefix}/{name}", value["value"]
            else:
                yield from _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{prefix}/{name}", float(value)


def _settings(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names; what is no plain value as text, which all trackers take."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, (bool, int, float, str))
            yield f"{prefix}{name}", value if plain else str(value)
