"""The reference of all settings, made of the strings under the fields.

python -m selfdistill.config.reference > docs/configuration.md
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from selfdistill.config.run import Config

_HEAD = """\
# Configuration

Every setting of a YAML file, made of the source by `python -m selfdistill.config.reference`. A
setting without a default must be given. Paths count from the file. `selfdistill train FILE
name=value` sets one for a single run.
"""


def reference() -> str:
    """Return the page: a table for each section, in the order in which they are met."""
    parts = [_HEAD, _table(Config)]
    seen: set[type[BaseModel]] = {Config}
    for path, section in _inside(Config, ""):
        if section in seen:
            continue
        seen.add(section)
        tag = section.model_fields.get("name")
        is_choice = tag is not None and get_origin(tag.annotation) is Literal
        title = f"`{path}`" + (f", `name: {tag.default}`" if tag and is_choice else "")
        summary = " ".join((section.__doc__ or "").split())
        parts.append(f"## {title}\n\n{summary}\n\n{_table(section)}")
    return "\n".join(parts)


def _inside(section: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in section.model_fields.items():
        for inner in _sections(field.annotation):
            place = f"{path}.{name}" if path else name
            yield place, inner
            yield from _inside(inner, place)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if get_origin(annotation) is None and isinstance(annotation, type):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _sections(argument)


def _table(section: type[BaseModel]) -> str:
    rows = ["| setting | value | default | |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if name == "name" and get_origin(field.annotation) is Literal:
            continue  # the title says it
        about = " ".join((field.description or "See below.").split()).replace("<", "&lt;")
        cells = (f"`{name}`", _values(field), _default(field), about)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n" if len(rows) > 2 else "It has no settings.\n"


def _values(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(limit, name):g}"
        for limit in field.metadata
        for name, sign in (("gt", ">"), ("ge", "at least"), ("lt", "<"), ("le", "at most"))
        if getattr(limit, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        kinds = dict.fromkeys(_type(each) for each in arguments)
        return " or ".join(kinds)
    if origin is tuple:
        inner = [_type(each) for each in arguments if each is not Ellipsis]
        return f"a list of {inner[0]}" if arguments[-1] is Ellipsis else f"[{', '.join(inner)}]"
    if origin is dict:
        return "a mapping"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return names.get(annotation, "text" if not isinstance(annotation, type) else _named(annotation))


def _named(annotation: type) -> str:
    return {"Path": "path", "date": "date"}.get(annotation.__name__, annotation.__name__)


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return ""
    if isinstance(default, BaseModel):
        tag = getattr(default, "name", None)
        return f"`name: {tag}`" if isinstance(tag, str) else "see below"
    if isinstance(default, str) and len(default) > 40:
        return f"{json.dumps(default)}"
    return f"`{json.dumps(default)}`"


if __name__ == "__main__":
    print(reference(), end="")
