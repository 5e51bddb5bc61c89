"""Settings of the command line, such as optimizer.learning_rate=1e-5, over those of a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import ErrorDetails

from selfdistill.config.section import ConfigError
from selfdistill.config.yaml_text import YAMLTextError, read_yaml


def override(settings: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return settings with others in their place; what a file does not have yet is added.

    Args:
        settings: as the file has them.
        assignments: each a dotted name, "=" and a value as YAML writes it.

    Raises:
        ConfigError: one of them is no assignment, or goes into what is no mapping.
    """
    settings = dict(settings)
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
            inner = {} if here.get(part) is None else here[part]
            if not isinstance(inner, dict):
                raise ConfigError(
                    f"{assignment!r} on the command line: {'.'.join(outer[: place + 1])} is "
                    f"{inner!r:.80} in the file, expected a mapping"
                )
            # A copy: under an alias of YAML, the same mapping stands at another place, too.
            here[part] = here = dict(inner)
        try:
            here[last] = read_yaml(text).data
        except YAMLTextError as error:
            raise ConfigError(f"{assignment!r} on the command line: {error}") from error
    return settings


def origin(error: ErrorDetails, settings: dict[str, Any], assignments: Sequence[str]) -> str | None:
    """Return the assignment that a wrong setting comes from; None where the file has it.

    Args:
        error: one of a ValidationError's.
        settings: what was validated, as `override` returned it.
        assignments: see `override`; the last one counts.
    """
    # An error's place also names the members of unions, and settings that are missing.
    place: list[str] = []
    here: Any = settings
    for part in error["loc"]:
        known = here if isinstance(here, dict) else range(len(here) if type(here) is list else 0)
        if part in known:
            place.append(str(part))
            here = here[part]
    if error["type"] == "union_tag_invalid":  # is told of the section that has the wrong name
        place.append("name")
    for assignment in reversed(assignments):
        parts = assignment.partition("=")[0].split(".")
        if parts == place[: len(parts)]:
            return assignment
    return None
