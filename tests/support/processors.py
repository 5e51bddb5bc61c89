"""What a test of one kind of processor says on another: where it would run."""

from __future__ import annotations


def needs(instructions: str) -> str:
    """A reason to skip: the flag of the missing instructions in /proc/cpuinfo."""
    return (
        f"run it on a processor with {instructions} among its flags in /proc/cpuinfo, and without "
        "ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA"
    )


NEEDS_BFLOAT16 = needs("amx_bf16 or avx512_bf16")
