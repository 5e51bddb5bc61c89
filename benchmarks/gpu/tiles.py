"""The fastest tiles of this GPU, written where `SELFDISTILL_AUTOTUNE=1` finds them.

Candidates are compiled by several processes first, then timed by one, the shipped tile first.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice

import torch

from benchmarks.gpu.section import Section
from benchmarks.gpu.setting import Setting
from benchmarks.memory import ROOT
from benchmarks.problems import DTYPES, Shape
from benchmarks.report import Table
from benchmarks.timing import Clock
from selfdistill_kernels import Objective
from selfdistill_kernels.backends.interface import LinearInputs, Needs
from selfdistill_kernels.backends.triton.autotune import candidates, fastest
from selfdistill_kernels.backends.triton.backend import TritonBackend
from selfdistill_kernels.backends.triton.plan import (
    Configuration,
    Kind,
    Machine,
    configuration,
    key_of,
)
from selfdistill_kernels.backends.triton.tuned_tiles import Tiles, save_tuned
from selfdistill_kernels.logits import LogitTransform

KINDS: tuple[Kind, ...] = ("sweep", "gradient")
OBJECTIVE = Objective("forward_kl")
ROUNDS = 3
FILE = "tuned_tiles.json"
# Of a section's time, for compiling.
COMPILING = 0.6


def ordered(machine: Machine, kind: Kind, itemsize: int) -> list[Configuration]:
    """Candidates, the shipped one first and then its like."""
    shipped = configuration(machine, kind, itemsize)
    found = [shipped, *(tile for tile in candidates() if tile != shipped)]

    def distance(tile: Configuration) -> float:
        names = ("rows", "columns", "inner", "warps", "stages")
        return sum(abs(math.log2(getattr(tile, n) / getattr(shipped, n))) for n in names)

    return sorted(found, key=distance)


def compile_share(setting: Setting, section: Section, number: int) -> None:
    """What one compiling process does: run every K-th candidate once, on few tokens."""
    few = Shape(min(128, setting.tuned.tokens), setting.tuned.hidden, setting.tuned.vocabulary)
    run = _runner(few, setting)
    machine = Machine.of(torch.device(setting.device))
    for kind in KINDS:
        tiles = ordered(machine, kind, DTYPES[setting.dtype].itemsize)
        for tile in islice(tiles, number, None, setting.workers):
            if section.left <= 0:
                return
            try:
                run(kind, tile)
            except Exception as error:  # does not fit this GPU: `fastest` passes over it, too
                section.left_out.append(f"{kind} {tile}: {type(error).__name__}")
    section.save()


def tune(setting: Setting, section: Section, command: list[str]) -> None:
    """Compile, time, keep the fastest of each kernel.

    Args:
        command: starts a compiling process; its number, seconds and file are appended.
    """
    seconds = COMPILING * section.left
    processes = [
        subprocess.Popen(
            [*command, "--worker", str(n), "--seconds", str(seconds),
             "--file", str(section.file.with_name(f"compiled-{n}.json"))],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for n in range(setting.workers)
    ]  # fmt: skip
    for process in processes:
        try:
            process.wait(timeout=max(1.0, seconds + 15.0 - (section.seconds - section.left)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for n in range(setting.workers):
        section.file.with_name(f"compiled-{n}.json").unlink(missing_ok=True)
    time_tiles(setting, section, setting.clock())


def time_tiles(setting: Setting, section: Section, clock: Clock) -> None:
    """Time candidates on the real problem while there is time."""
    itemsize = DTYPES[setting.dtype].itemsize
    machine = Machine.of(torch.device(setting.device))
    run = _runner(setting.tuned, setting)
    body: list[tuple[str, ...]] = []
    head = ("kernel", "shipped tile", "ms", "fastest tile", "ms", "tried")
    section.tables.append(Table(f"Tiles, N/H/V {setting.tuned}, {setting.dtype}", head, body))
    for number, kind in enumerate(KINDS):
        tiles = ordered(machine, kind, itemsize)
        # Half of the time that is left for the first kernel, all of it for the second.
        end = section.left * (1 - (number + 1) / len(KINDS))
        timed = _Timed(partial(run, kind), clock, partial(_is_before, section, end))
        best, least = fastest(tiles, timed)
        key = key_of(machine, kind, itemsize, heavy=setting.tuned.vocabulary % 128 != 0)
        save_tuned(section.file.with_name(FILE), key, best)
        own = timed.found.get(tiles[0])
        body.append(
            (kind, _name(tiles[0]), "does not run" if own is None else f"{own * 1e3:.2f}",
             _name(best), f"{least * 1e3:.2f}", f"{len(timed.found)} of {len(tiles)}")
        )  # fmt: skip
        section.data[key] = {
            "fastest": asdict(best), "seconds": least, "shipped": asdict(tiles[0]),
            "shipped seconds": own, "tried": {_name(t): s for t, s in timed.found.items()},
        }  # fmt: skip
        section.save()


def _is_before(section: Section, end: float) -> bool:
    return section.left > end


class _Timed:
    """Seconds of a tile; raises once there is no time left, but for the first tile that runs.

    Args:
        run: the kernel with a tile.
        clock: seconds of a call.
        has_time: whether another tile may begin.
    """

    def __init__(
        self, run: Callable[[Configuration], None], clock: Clock, has_time: Callable[[], bool]
    ) -> None:
        self._run, self._clock, self._has_time = run, clock, has_time
        self.found: dict[Configuration, float] = {}

    def __call__(self, tile: Configuration) -> float:
        if self.found and not self._has_time():
            raise TimeoutError("no time left")
        self._run(tile)
        self.found[tile] = min(self._clock(partial(self._run, tile)) for _ in range(ROUNDS))
        return self.found[tile]


def random_inputs(shape: Shape, setting: Setting) -> LinearInputs:
    """A dense problem without targets, on the setting's device."""
    dtype, device = DTYPES[setting.dtype], setting.device
    generator = torch.Generator(device).manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    student = randn(shape.tokens, shape.hidden)
    head = randn(shape.vocabulary, shape.hidden) / shape.hidden**0.5
    teacher = student + 0.1 * randn(shape.tokens, shape.hidden)
    return LinearInputs(student, teacher, head, None, None, None, None, None, LogitTransform())


def _runner(shape: Shape, setting: Setting) -> Callable[[Kind, Configuration], None]:
    """Runs the sweep or the gradient of one problem with a tile."""
    inputs = random_inputs(shape, setting)
    statistics = TritonBackend().statistics(inputs, OBJECTIVE, 0)
    weights = torch.full((shape.tokens, 3), 1.0 / shape.tokens, device=setting.device)
    needs = Needs(hidden=True, weight=False, bias=False)

    def run(kind: Kind, tile: Configuration) -> None:
        backend = TritonBackend(tiles=Tiles(fixed={kind: tile}))
        if kind == "sweep":
            backend.statistics(inputs, OBJECTIVE, 0)
        else:
            backend.gradient(inputs, OBJECTIVE, statistics, weights, needs, 0)

    return run


def _name(tile: Configuration) -> str:
    return f"{tile.rows}x{tile.columns}x{tile.inner}, {tile.warps} warps, {tile.stages} stages"
