"""DPP: which lane each lane reads, by the control field of an instruction."""

from __future__ import annotations

LANES, ROW = 64, 16


def dpp_source(control: int, lane: int) -> int | None:
    """The lane that `lane` reads; None outside of its row or wave."""
    row, place = lane // ROW * ROW, lane % ROW
    amount = control & 15
    if control < 0x100:  # quad_perm: two bits for each lane of four
        return lane // 4 * 4 + (control >> 2 * (lane % 4) & 3)
    kind = control & 0x1F0
    if kind == 0x100:  # row_shl
        return lane + amount if place + amount < ROW else None
    if kind == 0x110:  # row_shr
        return lane - amount if place >= amount else None
    if kind == 0x120:  # row_ror
        return row + (place - amount) % ROW
    if kind == 0x150:  # row_newbcast
        return row + amount
    whole_wave = {
        0x130: lane + 1 if lane + 1 < LANES else None,  # wave_shl
        0x134: (lane + 1) % LANES,  # wave_rol
        0x138: lane - 1 if lane else None,  # wave_shr
        0x13C: (lane - 1) % LANES,  # wave_ror
        0x140: row + ROW - 1 - place,  # row_mirror
        0x141: lane // 8 * 8 + 7 - lane % 8,  # row_half_mirror
        0x142: row - 1 if row else None,  # row_bcast15
        0x143: 31 if lane >= 32 else None,  # row_bcast31
    }
    if control not in whole_wave:
        raise ValueError(f"unknown DPP control {control:#x}")
    return whole_wave[control]


def cross_lanes(
    control: int, row_mask: int, bank_mask: int, reads_zero: int
) -> tuple[list[int], int]:
    """Lane read by each lane, -1 for zero; and the lanes that are written, one bit each.

    Args:
        control, row_mask, bank_mask, reads_zero: fields of a DPP instruction; the last one is
            bound_ctrl.
    """
    sources, written = [], 0
    for lane in range(LANES):
        source = dpp_source(control, lane)
        sources.append(-1 if source is None else source)
        in_mask = row_mask >> lane // ROW & bank_mask >> lane % ROW // 4 & 1
        if in_mask and (source is not None or reads_zero):
            written |= 1 << lane
    return sources, written
