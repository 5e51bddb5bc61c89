"""Settings of the command line, such as optimizer.learning_rate=1e-5, over those of a file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import yaml

from selfdistill.config.section import ConfigError


def override(settings: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return settings with others in their place; what a file does not have yet is added.

    Args:
        settings: as the file has them.
        assignments: each a dotted name, "=" and a value as YAML writes it.

    Raises:
        ConfigError: one of them is no assignment, or goes into what is no mapping.
    """
    settings = copy.deepcopy(settings)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        *outer, last = name.split(".")
        if not equals or not all((*outer, last)):
            raise ConfigError(
                f"{assignment!r} is no setting, expected name=value with the name's parts between "
                "dots, such as optimizer.learning_rate=1e-5"
            )
        here = settings
        for place, part in enumerate(outer):
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
            if not isinstance(here, dict):
                raise ConfigError(
                    f"{assignment!r} on the command line: {'.'.join(outer[: place + 1])} is "
                    f"{here!r:.80} in the file, expected a mapping"
                )
        try:
            here[last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{assignment!r} on the command line: the value is no YAML "
                f"({' '.join(str(error).split())})"
            ) from error
    return settings


def origin(place: Sequence[str | int], assignments: Sequence[str]) -> str | None:
    """Return the assignment that a setting comes from; None where the file has it.

    Args:
        place: keys from the outside in; it also names the members of unions.
        assignments: see `override`; the last one counts.
    """
    for assignment in reversed(assignments):
        parts = iter(map(str, place))
        if all(part in parts for part in assignment.partition("=")[0].split(".")):
            return assignment
    return None
