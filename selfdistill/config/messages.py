"""What is wrong with a configuration, in words: one line for each setting, with a suggestion."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

Place = Sequence[str | int]

# More sections than these that have a setting are no hint.
_FEW = 3
# What settings and choices were called in earlier versions; now they are called as in the kernels.
_RENAMED = {"token_clip": "divergence_clip", "token_mean": "mean"}


def describe_error(error: ErrorDetails, root: type[BaseModel]) -> str:
    """Return "steps: Input should be greater than 0, got -1".

    Args:
        error: one of a ValidationError's.
        root: the model of the whole configuration.
    """
    place = error["loc"]
    if not place:  # of several settings together: all of them say nothing
        return error["msg"]
    where = ".".join(map(str, place))
    match error["type"]:
        case "extra_forbidden":
            what = f"there is no such setting{suggestion(place, root)}"
        case "union_tag_not_found":
            what = "it needs a `name`, such as {name: ...}"
        case _:
            what = error["msg"]
            if isinstance(error["input"], str) and error["input"] in _RENAMED:
                what += f" (it is called {_RENAMED[error['input']]} now)"
    return f"{where}: {what}, got {error['input']!r:.80}"


def suggestion(place: Place, root: type[BaseModel]) -> str:
    """Say what an unknown setting may have been meant to be; empty when nothing is near."""
    unknown = str(place[-1])
    if unknown in _RENAMED:
        return f" (it is called {_RENAMED[unknown]} now)"
    here = _sections_at(place[:-1], root)
    names = sorted({name for section in here for name in section.model_fields})
    elsewhere = sorted(set(_places_of(unknown, root)))
    if 0 < len(elsewhere) <= _FEW:
        return f" here (it belongs into {' or '.join(elsewhere)})"
    if near := get_close_matches(unknown, names, n=1):
        return f" (did you mean {near[0]}?)"
    return f" (there are {', '.join(names)})" if names else ""


def _sections_at(place: Place, root: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the sections that may stand at a place, which also names the members of unions."""
    here = [root]
    for part in place:
        inside = [s.model_fields[str(part)] for s in here if part in s.model_fields]
        if inside:
            here = [s for field in inside for s in _sections_in(field.annotation)]
        else:
            here = [s for s in here if part in (_tag(s), s.__name__)] or here
    return here


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections that a type allows."""
    # In Python 3.10 dict[str, int] passes for a class.
    if get_origin(annotation) is not None or not isinstance(annotation, type):
        for argument in get_args(annotation):
            yield from _sections_in(argument)
    elif issubclass(annotation, BaseModel):
        yield annotation


def _tag(section: type[BaseModel]) -> str | None:
    name = section.model_fields.get("name")
    return None if name is None else name.default


def _places_of(setting: str, root: type[BaseModel], path: str = "") -> Iterator[str]:
    """Yield the dotted paths of the sections that have a setting of this name."""
    for name, field in root.model_fields.items():
        inside = f"{path}.{name}" if path else name
        sections = list(_sections_in(field.annotation))
        having = [section for section in sections if setting in section.model_fields]
        tags = [tag for tag in map(_tag, having) if tag]
        if having:
            few = tags and len(having) < len(sections)
            yield f"{inside} with name: {' or '.join(tags)}" if few else inside
        for section in sections:
            yield from _places_of(setting, section, inside)
