"""Tensors, pointers and functions of `triton.language` and Gluon on numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from gluon_emulator.schedule import Fault


class Tensor(np.ndarray):
    """An array with the methods that Triton's tensors have. Layouts are None."""

    @property
    def type(self) -> Any:
        return self

    @property
    def layout(self) -> None:
        return None

    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[override,misc]
        return self + other  # a new value: names that shared the old one keep it

    def to(self, dtype: Any) -> Tensor:
        return self.astype(dtype)

    def expand_dims(self, axis: int) -> Tensor:
        return np.expand_dims(self, axis)

    def permute(self, *order: int) -> Tensor:
        return self.transpose(*order)

    def split(self) -> tuple[Tensor, Tensor]:
        return self[..., 0], self[..., 1]


def tensor(value: Any, dtype: Any = None) -> Tensor:
    """Anything as a Tensor."""
    return np.asarray(value, dtype).view(Tensor)


class Pointer:
    """A flat array and offsets into it."""

    def __init__(self, array: np.ndarray, offsets: Any = 0) -> None:
        self.array, self.offsets = array, offsets

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.array, self.offsets + by)

    def _inside(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        offsets, mask = np.broadcast_arrays(self.offsets, True if mask is None else mask)
        outside = mask & ((offsets < 0) | (offsets >= self.array.size))
        if outside.any():
            raise Fault(f"an access at {offsets[outside].max()} of {self.array.size} elements")
        return offsets, mask

    def load(self, mask: Any = None, other: Any = 0) -> Tensor:
        offsets, mask = self._inside(mask)
        found = np.where(mask, self.array[np.where(mask, offsets, 0)], other)
        return tensor(found, self.array.dtype)

    def store(self, value: np.ndarray, mask: Any, part: slice) -> None:
        """Store the part of the first axis that is this program's."""
        offsets, mask = self._inside(mask)
        inside = mask[part]
        self.array[offsets[part][inside]] = value[part][inside]


def fma(a: Any, b: Any, c: Any) -> Tensor:
    """Rounded once: products of float32 are exact in float64."""
    wide = np.asarray(a, np.float64) * np.asarray(b, np.float64) + np.asarray(c, np.float64)
    return tensor(wide, np.float32)


class Functions:
    """What needs no schedule, under the names of `gl` and `tl`."""

    float32, float64 = np.float32, np.float64
    int32, int64, bfloat16 = np.int32, np.int64, np.float32
    static_range = staticmethod(range)
    fma = staticmethod(fma)
    exp = staticmethod(np.exp)
    log = staticmethod(np.log)
    abs = staticmethod(np.abs)

    @staticmethod
    def SliceLayout(dim: int, parent: Any) -> None:
        return None

    @staticmethod
    def NVMMADistributedLayout(*args: Any) -> None:
        return None

    @staticmethod
    def arange(start: int, stop: int, layout: Any = None) -> Tensor:
        return tensor(np.arange(start, stop, dtype=np.int32))

    @staticmethod
    def full(shape: tuple[int, ...], value: float, dtype: Any, layout: Any = None) -> Tensor:
        return tensor(np.full(shape, value, dtype))

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: Any, layout: Any = None) -> Tensor:
        return cls.full(shape, 0, dtype)

    @staticmethod
    def zeros_like(like: Tensor) -> Tensor:
        return tensor(np.zeros_like(like))

    @staticmethod
    def cdiv(a: Any, b: Any) -> Any:
        return (a + b - 1) // b

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Tensor:
        return tensor(np.where(condition, a, b))

    @staticmethod
    def maximum(a: Any, b: Any) -> Tensor:
        return tensor(np.fmax(a, b))  # of a number and a NaN the number, as on a GPU

    @staticmethod
    def minimum(a: Any, b: Any) -> Tensor:
        return tensor(np.fmin(a, b))

    @staticmethod
    def max(a: Tensor, axis: int) -> Tensor:
        return tensor(np.fmax.reduce(a, axis))

    @staticmethod
    def sum(a: Tensor, axis: int) -> Tensor:
        return tensor(np.sum(a, axis))

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
        return pointer.load(mask, other)
