"""Gives each of several parameters that share a description ("bias, teacher_bias: ...") an entry
of its own in the reference, with its type and default. Griffe loads this as mkdocs.yml says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe


class SharedDescriptions(griffe.Extension):
    """Splits the entries of parsed docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the sections of one object's docstring."""
        if obj.docstring is None:
            return
        # A list of names may go on in the next line.
        obj.docstring.value = re.sub(
            r"^( +(?:\w+, )*\w+,)\n +(?=\w+[,:])", r"\1 ", obj.docstring.value, flags=re.MULTILINE
        )
        for section in obj.docstring.parsed:
            if isinstance(section, griffe.DocstringSectionParameters):
                section.value = list(entries(obj, section.value))


def entries(
    obj: griffe.Object, described: list[griffe.DocstringParameter]
) -> Iterator[griffe.DocstringParameter]:
    """One entry for each name; those of a class are the parameters of its __init__."""
    function = obj.members.get("__init__", obj) if obj.is_class else obj
    signature = {p.name: p for p in getattr(function, "parameters", ())}
    for entry in described:
        for name in entry.name.split(", "):
            known = signature.get(name)
            yield griffe.DocstringParameter(
                name,
                description=entry.description,
                annotation=known.annotation if known else entry.annotation,
                value=known.default if known else None,
            )
