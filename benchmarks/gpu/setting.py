"""Sizes of a run: on a GPU, and in a rehearsal on a CPU under Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.problems import Shape
from benchmarks.timing import Clock, clock_for

# The last is an experiment: whatever it does, the others are done.
SECTIONS = ("values", "whole", "tiles", "losses", "step", "specialised")


@dataclass(frozen=True)
class Setting:
    """What runs where.

    Attributes:
        device: "cuda" or "cpu".
        clock: makes what tells the seconds of a call.
        minutes: that the whole run may take; shares: of them, for each section. They add up to 1;
            what a section does not use goes to those that follow.
        dtypes: of the small problems; sizes: their N, H, V (values.cases).
        workers: processes that compile and check at a time.
        shapes: of the timed problems, the most telling first; dtype: theirs.
        whole: N, H, V of the problem that is checked at its real size.
        wide: N and V of logits with more elements than 32 bits count; None leaves them out.
        tuned: N, H, V of the problem that tiles are timed on.
        rounds: timed rounds.
        model, step: of the training step, step.ModelSize's arguments and its shape as text, which
            needs no transformers; step_dtype: what it computes in.
        slab_bytes: the workspace that makes a dense loss take the sweep and slabs.
    """

    device: str
    clock: Callable[[], Clock]
    minutes: float
    shares: Mapping[str, float]
    dtypes: tuple[str, ...]
    sizes: Mapping[str, tuple[int, int, int]]
    workers: int
    shapes: tuple[Shape, ...]
    dtype: str
    whole: Shape
    wide: tuple[int, int] | None
    tuned: Shape
    rounds: int
    model: Mapping[str, Any]
    step: str
    step_dtype: torch.dtype
    slab_bytes: int


def on_a_gpu() -> Setting:
    """Nine minutes of a GPU with 80 GiB or more; smaller ones are told what did not fit."""
    return Setting(
        device="cuda",
        clock=lambda: clock_for("cuda"),
        minutes=9.0,
        shares={
            "values": 0.25, "whole": 0.10, "tiles": 0.13, "losses": 0.32, "step": 0.12,
            "specialised": 0.08,
        },
        dtypes=("bfloat16", "float32", "float16"),
        sizes={
            "plain": (256, 192, 1024), "ragged": (300, 200, 1531), "one token": (1, 72, 259),
            "many": (1030, 64, 4099),
        },
        workers=max(1, min(12, (os.cpu_count() or 1) - 2)),
        shapes=(Shape(8192, 4096, 128256), Shape(8192, 2048, 151936), Shape(4096, 1024, 151936)),
        dtype="bfloat16",
        whole=Shape(8192, 4096, 128256),
        wide=(16384, 151936),
        tuned=Shape(8192, 4096, 128256),
        rounds=7,
        model={
            "family": "qwen3", "layers": 8, "hidden": 2048, "intermediate": 6144, "heads": 16,
            "kv_heads": 8, "head_dim": 128, "vocabulary": 151936,
        },
        step="512/512/256/16",
        step_dtype=torch.bfloat16,
        slab_bytes=64 << 20,
    )  # fmt: skip


def rehearsal() -> Setting:
    """Tiny problems on a CPU: every section runs, and no time is one."""
    return Setting(
        device="cpu",
        clock=StandInClock,
        minutes=9.0,
        shares={
            "values": 0.30, "whole": 0.10, "tiles": 0.10, "losses": 0.30, "step": 0.19,
            "specialised": 0.01,
        },
        dtypes=("float32",),
        sizes={
            "plain": (16, 32, 64), "ragged": (7, 24, 75), "one token": (1, 8, 17),
            "many": (17, 8, 70),
        },
        workers=2,
        shapes=(Shape(24, 16, 264),),
        dtype="float32",
        whole=Shape(12, 16, 140),
        wide=(3, 130),
        tuned=Shape(8, 16, 130),
        rounds=2,
        model={
            "layers": 2, "hidden": 64, "intermediate": 64, "heads": 2, "kv_heads": 1,
            "head_dim": 32, "vocabulary": 128,
        },
        step="12/6/5/2",
        step_dtype=torch.float32,
        slab_bytes=48 * 4 * 64,
    )  # fmt: skip


class StandInClock:
    """In place of a device's clock: runs the call and says 1, 2, 3, ... milliseconds in turn."""

    def __init__(self) -> None:
        self._times: Iterator[int] = iter(range(1, 1 << 62))

    def __call__(self, step: Callable[[], object]) -> float:
        step()
        return next(self._times) / 1e3
