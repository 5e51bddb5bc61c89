"""Triton's interpreter, made to do what the hardware does where it does not, and shuffled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

# A hidden size that fills no whole number of inner tiles, with rows that suit a tensor descriptor.
# The interpreter of Triton 3.5 takes the distance of rows, in elements, for bytes and refuses 24 of
# float32 (96 bytes), although compiled kernels take them.
RAGGED_HIDDEN = 32 if triton.__version__.startswith("3.5.") else 24


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


class Guard:
    """Checks every access of a kernel against the tensors that it was given."""

    def __init__(self) -> None:
        self.launches = 0
        self._ranges: list[tuple[int, int]] = []

    def allow(self, values: list[Any]) -> None:
        """The arguments of the next launch."""
        self.launches += 1
        tensors = [getattr(value, "base", value) for value in values]
        self._ranges = [
            (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor))
            for tensor in tensors
            if isinstance(tensor, torch.Tensor) and tensor.numel()
        ]

    def check(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        """Raise AssertionError where an element that is not masked lies outside of all tensors."""
        used = np.broadcast_to(pointers, np.broadcast(pointers, mask).shape)[
            np.broadcast_to(mask, np.broadcast(pointers, mask).shape)
        ].astype(np.uint64)
        inside = np.zeros(used.shape, dtype=bool)
        for first, last in self._ranges:
            inside |= (used >= first) & (used + np.uint64(itemsize) <= last)
        assert inside.all(), f"{(~inside).sum()} accesses outside of the kernel's tensors"


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first to the last element."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


@contextmanager
def guarded() -> Iterator[Guard]:
    """Checks all loads and stores of all kernels."""
    guard = Guard()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, prepare = (
        builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    )  # fmt: skip

    def init_args(self: Any, arguments: Any, keywords: Any) -> Any:
        prepared = prepare(self, arguments, keywords)
        guard.allow([*prepared[0], *prepared[1].values()])
        return prepared

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        guard.check(pointers.data, mask.data, size)
        return load(self, pointers, mask, *rest, **options)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        guard.check(pointers.data, mask.data, size)
        return store(self, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    executor._init_args_hst = init_args
    try:
        yield guard
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor._init_args_hst = prepare
