"""An AMD code object (ELF): machine code of a kernel, and how its waves start."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_SYMBOL_TABLES = (2, 11)  # section types
# Scalar registers of what a kernel may ask for, by bits of its properties; the fourth is the
# address of the arguments, and arguments in registers come behind them all.
_USER_REGISTERS = (4, 2, 2, 2, 2, 2, 1)
_ARGUMENTS = 3
_PRELOAD_ENTRY = 256  # bytes from the entry to the code that finds arguments in registers


@dataclass(frozen=True)
class Kernel:
    """A kernel in a code object.

    Attributes:
        code: machine code. entry: byte where waves start, past the part that loads the arguments
            where firmware does that.
        lds, scratch, arguments: bytes of static LDS, of private memory and of kernel arguments.
        address_register: scalar register with the address of the arguments.
        preload_register: the first of the registers that hold arguments.
        preloaded: 4-byte words of arguments in them.
        preload_offset: the first of these words.
        group_register: scalar register with the workgroup's number.
    """

    code: bytes
    entry: int
    lds: int
    scratch: int
    arguments: int
    address_register: int
    preload_register: int
    preloaded: int
    preload_offset: int
    group_register: int


@dataclass(frozen=True)
class _Section:
    kind: int
    address: int
    offset: int
    size: int
    link: int


def _sections(elf: bytes) -> list[_Section]:
    assert elf[:4] == b"\x7fELF", "not a code object"
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    found = []
    for number in range(count):
        _, kind, _, address, offset, length, link = struct.unpack_from(
            "<IIQQQQI", elf, table + number * size
        )
        found.append(_Section(kind, address, offset, length, link))
    return found


def _symbols(elf: bytes) -> dict[str, tuple[int, int, int]]:
    """Name -> section number, value and size."""
    sections = _sections(elf)
    found = {}
    for section in sections:
        if section.kind not in _SYMBOL_TABLES:
            continue
        names = sections[section.link].offset
        for at in range(section.offset, section.offset + section.size, 24):
            name, _, _, where, value, size = struct.unpack_from("<IBBHQQ", elf, at)
            text = elf[names + name : elf.index(b"\0", names + name)].decode()
            found[text] = where, value, size
    return found


def _at(elf: bytes, symbol: tuple[int, int, int]) -> int:
    """Offset in the file of a symbol of a linked object."""
    section = _sections(elf)[symbol[0]]
    return section.offset + symbol[1] - section.address


def read_kernel(elf: bytes, name: str) -> Kernel:
    """Read a linked code object; `name` is the kernel's."""
    symbols = _symbols(elf)
    function, descriptor = symbols[name], symbols[f"{name}.kd"]
    start, described = _at(elf, function), _at(elf, descriptor)
    lds, scratch, arguments = struct.unpack_from("<III", elf, described)
    (entry,) = struct.unpack_from("<q", elf, described + 16)
    assert descriptor[1] + entry == function[1], "the kernel does not start at its entry"
    (settings,) = struct.unpack_from("<I", elf, described + 52)
    properties, preload = struct.unpack_from("<HH", elf, described + 56)
    assert properties >> _ARGUMENTS & 1, "the kernel has no argument address"
    asked = [size * (properties >> bit & 1) for bit, size in enumerate(_USER_REGISTERS)]
    preloaded = preload & 0x7F
    return Kernel(
        code=elf[start : start + function[2]],
        entry=_PRELOAD_ENTRY if preloaded else 0,
        lds=lds,
        scratch=scratch,
        arguments=arguments,
        address_register=sum(asked[:_ARGUMENTS]),
        preload_register=sum(asked),
        preloaded=preloaded,
        preload_offset=preload >> 7,
        group_register=settings >> 1 & 31,
    )


def text_section(elf: bytes, symbol: str) -> bytes:
    """Machine code behind a symbol of an object that was not linked."""
    where, value, _ = _symbols(elf)[symbol]
    section = _sections(elf)[where]
    return elf[section.offset + value : section.offset + section.size]
