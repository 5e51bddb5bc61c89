"""Reads files with one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfdistill.tasks.interface import TaskError
from selfdistill.tasks.rows import Row, WrittenFloat

# How files begin that are something else; the text says what to do.
_OTHER_FILES = {
    b"\xff\xfe": "UTF-16 text: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "gzip: unpack it (gunzip)",
    b"\x28\xb5\x2f\xfd": "zstd: unpack it (unzstd)",
    b"PK\x03\x04": "a zip archive: unpack it (unzip)",
    b"PAR1": "Parquet: read its folder with task.name: hub",
}
# Python reads no longer integers, so that nobody makes it slow; the text is as exact.
_MOST_DIGITS = 4_000


class _Object(dict[str, Any]):
    """A JSON object that knows which of its keys came more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        keys = [key for key, _ in pairs]
        self.repeated = sorted({key for key in keys if keys.count(key) > 1})


def jsonl_rows(path: Path) -> Iterator[Row]:
    """Yield the objects of a file with one JSON object a line; empty lines are left out.

    Numbers keep what is written: `WrittenFloat` with a point or exponent, text for integers of
    thousands of digits.

    Raises:
        TaskError: there is no such file, it is not UTF-8, or a line is not one JSON object.
    """
    try:
        with path.open("rb") as file:
            beginning = file.read(4)
        # Foreign bytes become lone surrogates, so that the line that has them can be named.
        text = path.open(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise TaskError(f"task.splits: cannot read {path}: {error.strerror}") from error
    with text:
        for magic, name in _OTHER_FILES.items():
            if beginning.startswith(magic):
                raise TaskError(f"{path} is no UTF-8 text with one JSON object a line but {name}")
        for number, line in enumerate(text, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield Row(_read_object(line, place), place)


def _read_object(line: str, place: str) -> dict[str, Any]:
    foreign = next((c for c in line if "\udc80" <= c <= "\udcff"), None)
    if foreign is not None:
        raise TaskError(
            f"{place} has the byte 0x{ord(foreign) - 0xDC00:02x}, which is no UTF-8; save the file "
            "as UTF-8 (if it is Latin-1: iconv -f ISO-8859-1 -t UTF-8)"
        )
    if "\0" in line:
        raise TaskError(f"{place} has zero bytes, expected UTF-8 text; is the file UTF-16?")
    try:
        fields = json.loads(
            line,
            parse_float=WrittenFloat,
            parse_int=lambda digits: int(digits) if len(digits) < _MOST_DIGITS else digits,
            object_pairs_hook=_Object,
        )
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{place} is not JSON: {error.msg} at character {error.pos + 1}; expected one whole "
            "object on each line"
        ) from error
    except RecursionError:
        raise TaskError(
            f"{place} is nested too deeply to be read, expected an object of texts and numbers; "
            "take the nested field out"
        ) from None
    if not isinstance(fields, _Object):
        raise TaskError(
            f"{place} holds a value of type {type(fields).__name__}, expected an object; write "
            'each problem on a line of its own, as {"question": ..., "answer": ...}'
        )
    if fields.repeated:
        raise TaskError(
            f"{place} has the key {', '.join(map(repr, fields.repeated))} more than once, expected "
            "it once; remove the one that is not meant"
        )
    return fields
