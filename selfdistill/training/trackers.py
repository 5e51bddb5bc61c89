"""Figures of a run for experiment trackers, by accelerate; loaded where one is configured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from rich.console import Console

from selfdistill.config import Config, ConfigError, TrackerConfig
from selfdistill.errors import UserError
from selfdistill.runlog import JsonLines
from selfdistill.visible import say


class TrackerError(UserError):
    """A tracker that is not installed, or that does not start."""


@contextmanager
def following(config: Config, logs: Mapping[str, JsonLines], console: Console) -> Iterator[None]:
    """Start the configured trackers, hand them every record that is logged, end them with the run.

    One that fails later on is named in a line of text, and the run goes on without it.

    Args:
        config: of the run, which they note down.
        logs: each under the word that its figures are called by.
        console: is told of a tracker that fails.

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
    trackers: list[_Tracker] = []
    with ExitStack() as stack:
        for settings in config.trackers:
            if settings.name not in LOGGER_TYPE_TO_CLASS:
                raise ConfigError(
                    f"trackers: there is no {settings.name!r}, expected one of accelerate's: "
                    f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
                )
            started = _start(LOGGER_TYPE_TO_CLASS[settings.name], settings, config)
            trackers.append(_Tracker(settings.name, started, console))
            stack.callback(trackers[-1].tell, "finish")
        for word, log in logs.items():
            log.follower = partial(_hand_on, trackers, word)
            stack.callback(setattr, log, "follower", None)
        yield


class _Tracker:
    """A tracker whose failures end no run: they are said, once for each thing that it fails at."""

    def __init__(self, name: str, tracker: Any, console: Console) -> None:
        self._name = name
        self._tracker = tracker
        self._console = console
        self._said: set[str] = set()

    def tell(self, what: str, *args: Any, **options: Any) -> None:
        try:
            getattr(self._tracker, what)(*args, **options)
        except Exception as error:  # a program of somebody else, which may want a network
            if what not in self._said:
                self._said.add(what)
                say(
                    self._console,
                    f"Warning: the tracker {self._name} failed at {what} ({type(error).__name__}: "
                    f"{error}). The run goes on, and its own files have every figure.",
                )


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


def _hand_on(trackers: Sequence[_Tracker], word: str, record: Mapping[str, Any]) -> None:
    values = dict(_numbers(record, word))
    for tracker in trackers:
        tracker.tell("log", values, step=record["step"])


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
