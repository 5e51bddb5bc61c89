"""Which compiled kernels are refused, and how many programs fit a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass

from selfdistill_kernels.tools.audit.build import Report

KIBIBYTE = 1024
GEMM_KERNELS = ("sweep", "mixture", "gradient", "product")


@dataclass(frozen=True)
class Limits:
    """Of one architecture.

    Attributes:
        shared: bytes a program may take; shared_total: bytes of a multiprocessor, of which every
            program takes `shared_reserved` more than it asked for.
        registers: of a multiprocessor, in registers of one lane times lanes.
        warps: resident at most. lanes: of a warp.
        tensor_core: instruction that a GEMM must contain.
        asynchronous: copy instruction that a GEMM must contain, or None.
    """

    shared: int
    shared_total: int
    shared_reserved: int
    registers: int
    warps: int
    lanes: int
    tensor_core: str
    asynchronous: str | None


LIMITS = {
    "sm_80": Limits(
        163 * KIBIBYTE, 164 * KIBIBYTE, KIBIBYTE, 65536, 64, 32, "HMMA", "LDGSTS"
    ),
    "sm_90": Limits(
        227 * KIBIBYTE, 228 * KIBIBYTE, KIBIBYTE, 65536, 64, 32, "HGMMA", "UTMALDG"
    ),
    "sm_100": Limits(
        227 * KIBIBYTE, 228 * KIBIBYTE, KIBIBYTE, 65536, 64, 32, "UTCHMMA", "UTMALDG"
    ),
    "sm_120": Limits(
        99 * KIBIBYTE, 100 * KIBIBYTE, KIBIBYTE, 65536, 48, 32, "HMMA", "UTMALDG"
    ),
    "gfx942": Limits(64 * KIBIBYTE, 64 * KIBIBYTE, 0, 4 * 512 * 64, 32, 64, "v_mfma", None),
    "gfx950": Limits(160 * KIBIBYTE, 160 * KIBIBYTE, 0, 4 * 512 * 64, 32, 64, "v_mfma", None),
}  # fmt: skip
TENSOR_MEMORY_COLUMNS = 512
# Two for each of four schedulers (AMD's SIMDs): where there is one, nothing runs while it waits.
LEAST_WARPS = 8
# A scalar that does not fit goes to a lane of a vector register; that many take four of them.
MOST_SCALARS_SPILLED = 256


def refusals(kernel: str, report: Report, architecture: str) -> list[str]:
    """Reasons not to ship this kernel; empty when it passes."""
    limits = LIMITS[architecture]
    reasons = []
    if report.spilled:
        reasons.append(f"spills {report.spilled}")
    if report.shared > limits.shared:
        reasons.append(f"shared memory {report.shared} over the limit of {limits.shared}")
    if report.scalars_spilled > MOST_SCALARS_SPILLED:
        reasons.append(f"spills {report.scalars_spilled} scalars")
    if kernel in GEMM_KERNELS:
        warps = resident_warps(report, architecture)
        if warps < LEAST_WARPS:
            reasons.append(f"only {warps} warps fit a multiprocessor")
        if not report.tensor.get(limits.tensor_core):
            reasons.append(f"no {limits.tensor_core}")
        if limits.asynchronous and not report.asynchronous.get(limits.asynchronous):
            reasons.append(f"no {limits.asynchronous}")
    return reasons


def resident_programs(report: Report, architecture: str) -> int:
    """Programs that a multiprocessor holds at a time."""
    limits = LIMITS[architecture]
    granule = 8
    registers = -(-report.registers // granule) * granule * limits.lanes * report.warps
    bounds = [limits.warps // report.warps, limits.registers // max(registers, 1)]
    if report.shared:
        bounds.append(limits.shared_total // (report.shared + limits.shared_reserved))
    if report.tensor_memory:
        bounds.append(TENSOR_MEMORY_COLUMNS // report.tensor_memory)
    return min(bounds)


def resident_warps(report: Report, architecture: str) -> int:
    """Warps that a multiprocessor holds at a time: the occupancy."""
    return resident_programs(report, architecture) * report.warps
