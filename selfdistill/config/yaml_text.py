"""YAML as people write it, held to what they can have meant: each key once, and a bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

# Values of a document after its aliases are written out; a configuration has about a hundred.
_MOST_VALUES = 10_000


class YAMLTextError(ValueError):
    """Text that is not YAML, or not one that a person can have meant; the message says where."""


# A configuration has four levels.
_MOST_LEVELS = 100


class _Loader(yaml.SafeLoader):
    """Counts levels, because where Python's recursion ends hangs on what else the process does."""

    levels = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.levels += 1
        if self.levels > _MOST_LEVELS:
            raise YAMLTextError("not valid YAML: it is nested too deeply")
        try:
            return super().compose_node(parent, index)
        finally:
            self.levels -= 1


@dataclass(frozen=True)
class YAMLDocument:
    """What a text says, and where it says it.

    Attributes:
        data: mappings, lists and scalars.
        root: the node tree that the data were made from; None for an empty text.
    """

    data: Any
    root: yaml.Node | None

    def line(self, place: Sequence[str | int]) -> int | None:
        """Return the line (from 1) of a setting; None for the document as a whole.

        Args:
            place: keys and positions from the outside in; those that the text does not have are
                passed over.
        """
        node, line = self.root, None
        for part in place:
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == str(part):
                        node, line = value, key.start_mark.line + 1
                        break
            elif isinstance(node, yaml.SequenceNode) and part in range(len(node.value)):
                node = node.value[part]
                line = node.start_mark.line + 1
        return line


def read_yaml(text: str) -> YAMLDocument:
    """Read one YAML document with plain data only.

    Raises:
        YAMLTextError: the text is not YAML, has a key twice, is nested too deeply, or has aliases
            that make it huge.
    """
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return YAMLDocument(None, None)
            _check(root)
            return YAMLDocument(loader.construct_document(root), root)
        finally:
            loader.dispose()
    except YAMLTextError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        # YAML's own messages have several lines: what, where, and an excerpt.
        raise YAMLTextError(f"not valid YAML: {' '.join(str(error).split())}") from error


def _check(root: yaml.Node) -> None:
    """Walk through a document as if its aliases were written out."""
    waiting, seen = [root], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise YAMLTextError(
                f"it has more than {_MOST_VALUES} values once its aliases (*name) are written out: "
                "write them out, or leave them out"
            )
        if isinstance(node, yaml.MappingNode):
            marks: dict[tuple[str, str], yaml.Mark] = {}
            for key, value in node.value:
                waiting += [key, value]
                if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                    continue
                first = marks.setdefault((key.tag, key.value), key.start_mark)
                if first is not key.start_mark:
                    raise YAMLTextError(
                        f"line {key.start_mark.line + 1}: {key.value!r} is there already, in line "
                        f"{first.line + 1}: leave one of the two out"
                    )
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
