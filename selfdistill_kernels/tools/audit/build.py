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
from selfdistill_kernels.tools.audit.record import Job

SASS_BYTES = 16  # of an instruction
TENSOR = re.compile(r"\b(HMMA|QGMMA|HGMMA|UTCHMMA|UTCQMMA|v_mfma)\w*")
ASYNC = re.compile(r"\b(LDGSTS|UTMALDG|UBLKCP)\b")


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel.

    Attributes:
        registers: a thread's. spilled: bytes (NVIDIA) or registers (AMD) that did not fit.
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


def build(job: Job, architecture: str) -> Report:
    """Compile for "sm_<capability>" or "gfx942".

    Raises:
        Exception: whatever Triton raises when it cannot.
    """
    amd = architecture.startswith("gfx")
    target = (
        GPUTarget("hip", architecture, 64)
        if amd
        else GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    )
    source = ASTSource(
        job.kernel,
        dict(job.signature),
        dict(job.constants),
        {(job.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in job.aligned},
    )
    options = compiler_options(job.shape)
    started = time.perf_counter()
    compiled = triton.compile(source, target=target, options=options)
    seconds = time.perf_counter() - started
    return (_read_amd if amd else _read_nvidia)(compiled, job.shape.warps, seconds)


def _read_nvidia(compiled: Any, warps: int, seconds: float) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", cubin)
        sass = _cuobjdump("-sass", cubin)
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
        spilled=value(r"\.vgpr_spill_count"),  # scalars spill to lanes of vector registers
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
