"""Runs a few instructions, written as assembly, on waves that a test fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.backends.amd import compiler

from amd_machine.code_object import text_section
from amd_machine.execute import Memory, Wave, new_lds, run_group
from amd_machine.program import Program


def assemble(text: str, architecture: str = "gfx942") -> bytes:
    """Machine code of instructions, by the assembler that Triton brings."""
    source = f".text\ncode:\n{text}\ns_endpgm\n"
    build: Callable[..., Any] | None = getattr(compiler, "assemble_amdgcn", None)
    if build is None:  # before Triton 3.9
        build = compiler.amd.assemble_amdgcn
    return text_section(build(source, architecture, ""), "code")


def run_assembly(
    text: str,
    *,
    vectors: dict[int, Any] | None = None,
    scalars: dict[int, int] | None = None,
    tensors: Sequence[Tensor] = (),
    lds: int = 0,
    waves: int = 1,
    architecture: str = "gfx942",
    removed_barrier: int = -1,
    seed: int | None = None,
) -> list[Wave]:
    """Return the waves of a workgroup after the last instruction.

    Args:
        vectors: register number -> a value for all lanes, or [64]; accumulation registers from 256
            on. Floats are stored as float32.
        scalars: register number -> 32-bit value; 106 and 126 are VCC and EXEC.
        tensors: what the waves may reach; the address of tensor k is in s[32 + 2 k].
        seed: of turns in random order.

    Raises:
        Fault: as execute.execute.
    """
    program = Program.of(assemble(text, architecture))
    memory = Memory([(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors])
    shared = new_lds(lds)
    running = []
    for number in range(waves):
        wave = Wave(number=number)
        for register, value in (vectors or {}).items():
            wave.vectors[register] = as_bits(value)
        for register, value in (scalars or {}).items():
            wave.scalars[register] = value & 0xFFFFFFFF
        for k, tensor in enumerate(tensors):
            address = tensor.data_ptr()
            wave.scalars[32 + 2 * k : 34 + 2 * k] = address & 0xFFFFFFFF, address >> 32
        wave.give_memory(memory, *shared, lds)
        running.append(wave)
    run_group(
        program.view(removed_barrier), program, running, None if seed is None else Random(seed)
    )
    return running


def result(
    text: str,
    vectors: dict[int, Any] | None = None,
    scalars: dict[int, int] | None = None,
    register: int = 2,
    **options: Any,
) -> np.ndarray:
    """[64] uint32: a vector register, v2 unless said, after the instructions on one wave."""
    (wave,) = run_assembly(text, vectors=vectors, scalars=scalars, **options)
    return wave.vectors[register]


def as_bits(value: Any) -> np.ndarray:
    """uint32 bits of float32 or integer values."""
    array = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if array.dtype.kind == "f":
        return array.astype(np.float32).view(np.uint32)
    return (array.astype(np.int64) & 0xFFFFFFFF).astype(np.uint32)


def as_floats(bits: np.ndarray) -> np.ndarray:
    """float32 values of uint32 bits."""
    return np.ascontiguousarray(bits).view(np.float32)
