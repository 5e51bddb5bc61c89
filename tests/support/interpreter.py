"""Triton's interpreter, made to do what the hardware does where it does not, and shuffled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_as_hardware_does() -> None:
    """Rounds float32 to bfloat16 to nearest even (the interpreter truncates) and multiplies
    bfloat16 matrices by value (it takes their bits for integers)."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            bits = rounded.view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        wide = [
            interpreter.TensorHandle(_widened(x.data), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        ]
        return dot(self, *wide, d, *options)

    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Runs the programs of every grid in a random order."""
    random = Random(seed)
    builder = interpreter.interpreter_builder
    original = builder.set_grid_idx

    class Shuffle:
        order: list[int]

    def set_grid_dim(nx: int, ny: int, nz: int) -> None:
        assert ny == nz == 1
        Shuffle.order = list(range(nx))
        random.shuffle(Shuffle.order)
        type(builder).set_grid_dim(builder, nx, ny, nz)

    def set_grid_idx(x: int, y: int, z: int) -> None:
        original(Shuffle.order[x], y, z)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx
