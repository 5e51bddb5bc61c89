"""One machine instruction -> the operation of wave.c that it is, and the fields of `Instruction`.

tinygrad's decoder finds the encoding and its fields. What wave.c does not do is refused here by
name; such an instruction is a fault when a wave comes to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from tinygrad.renderer.amd import decode_inst

# Operand codes; accumulation registers lie 256 behind the vector registers.
VCC, VECTORS, ACCUMULATORS = 106, 256, 256
LITERAL, NO_OPERAND, ZERO, WHOLE = 255, -1, 128, 6
KINDS = (
    "F32", "F64", "I32", "U32", "I64", "U64", "I16", "U16", "CLASS_F32", "CLASS_F64", "BF16", "F16",
)  # fmt: skip
# Bits of a condition: less, equal, greater; the float conditions from U on are negations.
CONDITIONS = {
    "F": 0, "LT": 1, "EQ": 2, "LE": 3, "GT": 4, "LG": 5, "NE": 5, "GE": 6, "O": 7, "T": 7,
    "U": 8, "NGE": 9, "NLG": 10, "NGT": 11, "NLE": 12, "NEQ": 13, "NLT": 14, "TRU": 15,
}  # fmt: skip
BYTES = {
    "UBYTE": 1, "SBYTE": 1, "BYTE": 1, "USHORT": 2, "SSHORT": 2, "SHORT": 2,
    "DWORD": 4, "DWORDX2": 8, "DWORDX3": 12, "DWORDX4": 16,
}  # fmt: skip
CARRIES_IN = {"V_CNDMASK_B32", "V_ADDC_CO_U32", "V_SUBB_CO_U32", "V_SUBBREV_CO_U32"}
Fields = dict[str, Any]


class Unsupported(Exception):
    """An instruction that wave.c does not do."""


def decode(raw: bytes) -> tuple[str, Fields, int]:
    """Return operation, fields of `Instruction` that are not as in DEFAULTS, and bytes.

    Args:
        raw: at least the instruction's bytes.

    Raises:
        Unsupported: no such operation here.
    """
    try:
        found = decode_inst(raw, "cdna")
    except ValueError as error:
        raise Unsupported(str(error)) from error
    encoding = type(found).__name__
    given = {name: _code(getattr(found, name)) for name, _ in found._fields}
    name = re.sub(r"_E(32|64)$", "", found.op.name)
    if name.startswith("V_MFMA"):
        operation, fields = _matrix(name, given)
    elif name.startswith("V_ACCVGPR"):
        operation, fields = _accumulator_move(name, given)
    else:
        read = next((r for start, r in _READERS if encoding.startswith(start)), None)
        if read is None:
            raise Unsupported(f"{encoding} {name}")
        operation, fields = read(name, given, encoding)
    if "literal" in given:
        fields["literal"] = given["literal"]
    return operation, fields, found.size()


DEFAULTS: Mapping[str, Any] = {
    "source": (ZERO, ZERO, ZERO), "part": (WHOLE, WHOLE), "part_to": WHOLE, "cross": None,
}  # fmt: skip


def _code(value: Any) -> int:
    return value.offset if hasattr(value, "offset") else int(getattr(value, "value", value))


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _refuse_set(name: str, given: Mapping[str, int], *fields: str) -> None:
    for field in fields:
        if given.get(field):
            raise Unsupported(f"{name} with {field}")


# ---- scalar --------------------------------------------------------------------------------------


def _scalar(name: str, given: Mapping[str, int], encoding: str) -> tuple[str, Fields]:
    sources = (given["ssrc0"], given.get("ssrc1", ZERO), ZERO)
    return name, {"scalar_to": given.get("sdst", 0), "source": sources}


def _scalar_constant(name: str, given: Mapping[str, int], encoding: str) -> tuple[str, Fields]:
    """SOPK: a 16-bit constant beside the register that it changes or is compared with."""
    value = given["simm16"]
    if not name.startswith("S_CMPK") or "_I32" in name:
        value = _signed(value, 16)
    fields: Fields = {"scalar_to": given["sdst"], "literal": value & 0xFFFFFFFF}
    if name.startswith("S_CMPK"):
        fields["source"] = (given["sdst"], LITERAL, ZERO)
        return name.replace("S_CMPK", "S_CMP"), fields
    fields["source"] = (LITERAL, ZERO, ZERO)
    return name, fields


def _program_control(name: str, given: Mapping[str, int], encoding: str) -> tuple[str, Fields]:
    """SOPP; a branch's offset is in words from the instruction behind it."""
    if name.startswith("S_WAITCNT"):
        name = "S_WAITCNT"
    return name, {"offset": _signed(given["simm16"], 16)}


def _scalar_load(name: str, given: Mapping[str, int], encoding: str) -> tuple[str, Fields]:
    words = re.fullmatch(r"S_LOAD_DWORD(?:X(\d+))?", name)
    if not words:
        raise Unsupported(name)
    offset, register = 0, NO_OPERAND
    if given["imm"]:
        offset = _signed(given["offset"], 21)
        if given["soffset_en"]:
            register = given["soffset"]
    else:  # the field of the constant, or its own, names a register
        register = given["soffset"] if given["soffset_en"] else given["offset"] & 0x7F
    return name, {
        "scalar_to": given["sdata"],
        "source": (given["sbase"], register, ZERO),
        "offset": offset,
        "size": 4 * int(words[1] or 1),
    }


# ---- memory --------------------------------------------------------------------------------------


def _data(given: Mapping[str, int], field: str) -> int:
    return given[field] + ACCUMULATORS * given["acc"]


def _lds(name: str, given: Mapping[str, int], encoding: str) -> tuple[str, Fields]:
    low, high = given["offset0"], given["offset1"]
    fields: Fields = {
        "to": _data(given, "vdst"),
        "source": (given["addr"], _data(given, "data0"), _data(given, "data1")),
        "offset": high << 8 | low,
    }
    two = re.fullmatch(r"DS_(READ|WRITE)2(ST64)?_B(32|64)", name)
    if two:
        size = int(two[3]) // 8
        unit = size * (64 if two[2] else 1)
        return f"DS_{two[1]}2", {
            **fields, "size": size, "offset": unit * low, "offset_high": unit * high,
        }  # fmt: skip
    one = re.fullmatch(r"DS_(READ|WRITE)_([BUI])(\d+)(_D16(?:_HI)?)?", name)
    if one:
        fields |= {"size": int(one[3]) // 8, "half": _half(one[4]), "signed_load": one[2] == "I"}
        return f"DS_{one[1]}", fields
    return name, fields


def _half(suffix: str | None) -> int:
    return 0 if not suffix else 2 if suffix.endswith("HI") else 1


_ACCESS = re.compile(r"(?:BUFFER|GLOBAL)_(LOAD|STORE)_(\w+?)(_D16(?:_HI)?)?")


def _access(name: str) -> tuple[str, Fields]:
    found = _ACCESS.fullmatch(name)
    if not found or found[2] not in BYTES:
        raise Unsupported(name)
    return found[1], {
        "size": BYTES[found[2]],
        "half": _half(found[3]),
        "signed_load": found[2] in ("SBYTE", "SSHORT"),
    }


def _buffer(name: str, given: Mapping[str, int], encoding: str) -> tuple[str, Fields]:
    if name in ("BUFFER_INV", "BUFFER_WBL2"):
        return name, {}
    _refuse_set(name, given, "idxen")
    way, fields = _access(name)
    lane_offset = given["vaddr"] if given["offen"] else NO_OPERAND
    return f"BUFFER_{way}", {
        **fields,
        "to": _data(given, "vdata"),
        "source": (lane_offset, given["srsrc"], given["soffset"]),
        "offset": given["offset"],
        "to_lds": given["lds"],
    }


def _global(name: str, given: Mapping[str, int], encoding: str) -> tuple[str, Fields]:
    way, fields = _access(name)
    base = given["saddr"] if given["saddr"] < VCC else NO_OPERAND
    return f"GLOBAL_{way}", {
        **fields,
        "to": _data(given, "vdst"),
        "source": (given["addr"], base, _data(given, "data")),
        "offset": _signed(given["offset"], 13),
    }


# ---- vector --------------------------------------------------------------------------------------


def _matrix(name: str, given: Mapping[str, int]) -> tuple[str, Fields]:
    shape = re.fullmatch(r"V_MFMA_F32_(16|32)X\1X(\d+)_(F32|F16|BF16)(?:_1K)?", name)
    if not shape:
        raise Unsupported(name)
    _refuse_set(name, given, "cbsz", "abid", "blgp")
    moved = [ACCUMULATORS * (given["acc"] >> k & 1) for k in range(2)]
    into = ACCUMULATORS * given["acc_cd"]
    start = given["src2"] + (into if given["src2"] >= VECTORS else 0)
    return "MFMA", {
        "to": given["vdst"] + into,
        "source": (given["src0"] + moved[0], given["src1"] + moved[1], start),
        "size": int(shape[1]),
        "depth": int(shape[2]),
        "kind": KINDS.index(shape[3]),
    }


def _accumulator_move(name: str, given: Mapping[str, int]) -> tuple[str, Fields]:
    reads, writes = "WRITE" not in name, "READ" not in name
    return "V_MOV_B32", {
        "to": given["vdst"] + ACCUMULATORS * writes,
        "source": (given["src0"] + ACCUMULATORS * reads, ZERO, ZERO),
    }


def _packed(name: str, given: Mapping[str, int], encoding: str) -> tuple[str, Fields]:
    name = name.replace("V_MAD_MIX", "V_FMA_MIX")
    return name, {
        "to": given["vdst"],
        "source": (given["src0"], given["src1"], given["src2"] if "M" in name[5:] else ZERO),
        "select": given["opsel"],
        "select_high": given["opsel_hi"] | given["opsel_hi2"] << 2,
        "negate": given["neg"],
        "negate_high": given["neg_hi"],
        "clamp": given["clmp"],
    }


def _vector(name: str, given: Mapping[str, int], encoding: str) -> tuple[str, Fields]:
    sources = [given.get(f"vsrc{k}", given.get(f"src{k}", ZERO)) for k in range(3)]
    fields: Fields = {}
    if "SDWA" in encoding:
        fields |= _parts(name, given)
        for k in range(2):
            if given.get(f"s{k}"):
                sources[k] -= VECTORS
    elif "DPP" in encoding:
        fields["cross"] = given["dpp"], given["row_mask"], given["bank_mask"], given["bc"]
    if "src0_neg" in given:
        fields["negate"] = given["src0_neg"] | given["src1_neg"] << 1
        fields["absolute"] = given["src0_abs"] | given["src1_abs"] << 1
    if encoding.startswith("VOP3"):
        fields |= {"negate": given["neg"], "absolute": given.get("abs", 0)}
        fields |= {"scale": given["omod"], "clamp": given["clmp"], "select": given.get("opsel", 0)}
    if name == "V_BITOP3_B32":  # its truth table lies in the fields of modifiers
        table = fields["scale"] << 6 | fields["absolute"] << 3 | fields["negate"]
        fields |= {"condition": table, "scale": 0, "absolute": 0, "negate": 0}
    elif fields.get("select") and name != "V_PACK_B32_F16":
        raise Unsupported(f"{name} with opsel")
    if name in CARRIES_IN and encoding.startswith("VOP2"):
        sources[2] = VCC
    fields["source"] = tuple(sources)
    return _with_results(name, given, encoding, fields)


def _with_results(
    name: str, given: Mapping[str, int], encoding: str, fields: Fields
) -> tuple[str, Fields]:
    compares = re.fullmatch(r"V_CMP_(\w+)_([FIU]\d+)", name)
    if compares:
        condition, kind = compares[1], compares[2]
        if condition == "CLASS":
            condition, kind = "F", f"CLASS_{kind}"
        if kind not in KINDS:
            raise Unsupported(name)
        to = given["vdst"] if encoding.startswith("VOP3") else VCC
        if given.get("sd"):
            to = given["sdst"]
        fields |= {"scalar_to": to, "kind": KINDS.index(kind), "condition": CONDITIONS[condition]}
        return "V_CMP", fields
    to = given["vdst"]
    if name in ("V_READFIRSTLANE_B32", "V_READLANE_B32"):
        return name, {**fields, "scalar_to": to - VECTORS if to >= VECTORS else to}
    return name, {**fields, "to": to, "scalar_to": given.get("sdst", VCC)}


def _parts(name: str, given: Mapping[str, int]) -> Fields:
    _refuse_set(name, given, "omod", "clmp")
    if given.get("dst_unused") == 1:
        raise Unsupported(f"{name} that extends the sign of a part")
    return {
        "part": (given["src0_sel"], given.get("src1_sel", WHOLE)),
        "extend": (given["src0_sext"], given.get("src1_sext", 0)),
        "part_to": given.get("dst_sel", WHOLE),
        "part_rest": given.get("dst_unused", 0),
    }


_Reader = Callable[[str, Mapping[str, int], str], tuple[str, Fields]]
_READERS: tuple[tuple[str, _Reader], ...] = (
    ("SOPK", _scalar_constant),
    ("SOPP", _program_control),
    ("SOP", _scalar),
    ("SMEM", _scalar_load),
    ("DS", _lds),
    ("MUBUF", _buffer),
    ("GLOBAL", _global),
    ("VOP3P", _packed),
    ("VOP", _vector),
)
