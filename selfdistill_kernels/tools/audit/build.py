"""Compiles a job for a GPU that need not be there, and reads what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from selfdistill_kernels.backends.triton.launch import compiler_options
from selfdistill_kernels.backends.triton.plan import is_amd, lanes
from selfdistill_kernels.tools.audit.record import Job

SASS_BYTES = 16  # of an instruction
TENSOR = re.compile(r"\b(HMMA|QGMMA|HGMMA|UTCHMMA|UTCQMMA|v_mfma)\w*")
ASYNC = re.compile(r"\b(LDGSTS|UTMALDG|UBLKCP)\b")


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel.

    Attributes:
        registers: a thread's, on AMD with the accumulation registers.
        accumulators: accumulation registers among them (AMD).
        spilled: bytes (NVIDIA) or vector registers (AMD) that went to memory.
        scalars_spilled: scalar registers that went to lanes of vector registers (AMD).
        shared: bytes of shared memory a program. tensor_memory: columns of a Blackwell's TMEM.
        warps: of a program.
        tensor: names and counts of tensor-core instructions. asynchronous: of copies to shared
            memory that pass the registers by.
        code_bytes: size of the code. seconds: to compile.
    """

    registers: int
    spilled: int
    shared: int
    tensor_memory: int
    warps: int
    tensor: dict[str, int]
    asynchronous: dict[str, int]
    code_bytes: int
    seconds: float
    accumulators: int = 0
    scalars_spilled: int = 0


def build(job: Job, architecture: str) -> Report:
    """Compile for a target of judgement.LIMITS.

    Raises:
        Exception: whatever Triton raises when it cannot.
    """
    started = time.perf_counter()
    compiled = compile_job(job, architecture)
    seconds = time.perf_counter() - started
    read = _read_amd if is_amd(architecture) else read_nvidia
    return read(compiled, job.shape.warps, seconds)


def compile_job(job: Job, architecture: str) -> Any:
    """Triton's CompiledKernel for "sm_<capability>" or an AMD GPU such as "gfx942"."""
    target = (
        GPUTarget("hip", architecture, lanes(architecture))
        if is_amd(architecture)
        else GPUTarget("cuda", int(architecture.removeprefix("sm_")), lanes(architecture))
    )
    source = ASTSource(job.kernel, dict(job.signature), dict(job.constants), job.attributes)
    return triton.compile(source, target=target, options=compiler_options(job.shape))


def machine_code(compiled: Any) -> tuple[str, str]:
    """Resource usage and SASS of a kernel compiled for NVIDIA, as `cuobjdump` prints them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return _cuobjdump("--dump-resource-usage", cubin), _cuobjdump("-sass", cubin)


def read_nvidia(compiled: Any, warps: int, seconds: float) -> Report:
    """What is in a kernel that took `seconds` to compile for NVIDIA, and runs `warps`."""
    usage, sass = machine_code(compiled)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Report(
        registers=found["REG"],
        spilled=found["STACK"] + found["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        warps=warps,
        tensor=_counts(TENSOR, sass),
        asynchronous=_counts(ASYNC, sass),
        code_bytes=SASS_BYTES * len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
        seconds=seconds,
    )


def _read_amd(compiled: Any, warps: int, seconds: float) -> Report:
    text = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        found = re.search(rf"{name}:?\s+(\d+)", text)
        return int(found[1]) if found else 0

    return Report(
        registers=value(r"\.vgpr_count"),
        accumulators=value(r"\.agpr_count"),
        spilled=value(r"\.vgpr_spill_count"),
        scalars_spilled=value(r"\.sgpr_spill_count"),
        shared=compiled.metadata.shared,
        tensor_memory=0,
        warps=warps,
        tensor=_counts(TENSOR, text),
        asynchronous={},
        code_bytes=value("; codeLenInByte ="),
        seconds=seconds,
    )


def _counts(pattern: re.Pattern[str], text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in pattern.findall(text):
        counts[name] = counts.get(name, 0) + 1
    return counts


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    run = subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True)
    return run.stdout
