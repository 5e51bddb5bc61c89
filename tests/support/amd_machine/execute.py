"""Runs the workgroups of a launch on wave.c: registers, the LDS, barriers, and who goes next."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from amd_machine.code_object import Kernel
from amd_machine.lanes import LANES
from amd_machine.program import TENSOR, Program, ProgramView, WaveView, machine

EXEC, CONSTANTS = 126, 128
# Not a number as float32, as float64 and in both halves as bfloat16 and float16; no address either.
POISON = 0x7FFD7FFD
NO_LIMIT = 1 << 62
MAP_NORESERVE = 0x4000  # Linux; Python names it from 3.13 on
# The states that a wave stops in (wave.h).
AT_BARRIER, FINISHED, RACE = 1, 2, 7
FAULTS = {
    4: "access outside of the launch's tensors, or not aligned",
    5: "access outside of the LDS, or not aligned",
    6: "operation that the machine does not have",
    RACE: "two waves touch a byte and nothing orders them",
}


class Fault(Exception):
    """A wave did what it must not."""


class Race(Fault):
    """Two waves touched a byte, one of them wrote it, and nothing orders them."""


@dataclass(frozen=True)
class Schedule:
    """Who runs when.

    Attributes:
        seed: None runs workgroups and waves in order, each as far as it gets. Otherwise workgroups
            are shuffled, and waves take turns of random lengths.
        removed_barrier: index of a barrier that is taken to order nothing: waves still wait there.
    """

    seed: int | None = None
    removed_barrier: int = -1


@dataclass
class Counts:
    """Of one launch: wave instructions, and lanes that a buffer's bounds left out."""

    instructions: int = 0
    outside: int = 0


def execute(
    program: Program,
    kernel: Kernel,
    *,
    arguments: bytes,
    groups: int,
    waves: int,
    lds: int,
    tensors: Sequence[tuple[int, int]],
    schedule: Schedule = Schedule(),
) -> Counts:
    """Run a launch; the tensors change in place.

    Args:
        program: the kernel's decoded code.
        arguments: as they lie in memory.
        groups, waves: workgroups of the launch, waves of each. lds: bytes of each.
        tensors: first byte and the one behind the last, of each.

    Raises:
        Fault: an access outside of all tensors, a race, an operation that wave.c has not.
    """
    assert kernel.scratch == 0, "the kernel needs scratch memory"
    held = ctypes.create_string_buffer(arguments, len(arguments))
    address = ctypes.addressof(held)
    memory = Memory([*tensors, (address, address + len(arguments))])
    random = None if schedule.seed is None else Random(schedule.seed)
    order = list(range(groups))
    if random is not None:
        random.shuffle(order)
    view = program.view(schedule.removed_barrier)
    counts = Counts()
    for group in order:
        lds_bytes, lds_seen = new_lds(lds)
        running = []
        for number in range(waves):
            wave = Wave(group, number, kernel.entry)
            wave.give_arguments(kernel, held.raw, address)
            wave.give_memory(memory, lds_bytes, lds_seen, lds)
            running.append(wave)
        run_group(view, program, running, random)
        counts.instructions += sum(wave.view.executed for wave in running)
        counts.outside += sum(wave.view.outside for wave in running)
    return counts


class Memory:
    """The tensors of a launch, each with who touched which byte."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self.seen = [_zeros(last - first) for first, last in ranges]
        self.table = np.zeros(len(ranges), TENSOR)
        for row, (first, last), seen in zip(self.table, ranges, self.seen, strict=True):
            row["first"], row["last"], row["seen"] = first, last, seen.ctypes.data


def _zeros(size: int) -> np.ndarray:
    """[size] uint64 zeros that take memory where they are touched; tensors may be large."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return np.frombuffer(mmap.mmap(-1, 8 * size, flags=flags), np.uint64)


def new_lds(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Poisoned bytes of the LDS as [size / 4] uint32, and [size] uint64: who touched which."""
    return np.full(max(size // 4, 1), POISON, np.uint32), np.zeros(max(size, 4), np.uint64)


class Wave:
    """One wave; registers that nothing sets hold poison.

    Attributes:
        vectors: [512, 64] vector registers, accumulation registers behind them.
        scalars: [256] scalar registers, and the inline constants in their places.
    """

    def __init__(self, group: int = 0, number: int = 0, entry: int = 0) -> None:
        self.vectors = np.full((512, LANES), POISON, np.uint32)
        self.vectors[0] = np.arange(number * LANES, (number + 1) * LANES)
        self.scalars = scalar_file()
        self.view = WaveView(
            vectors=self.vectors.ctypes.data, scalars=self.scalars.ctypes.data,
            counter=entry // 4, group=group, wave=number,
        )  # fmt: skip
        self.waits = False

    def give_arguments(self, kernel: Kernel, arguments: bytes, address: int) -> None:
        """Set scalar registers as hardware does: where the arguments lie, and the first ones."""
        at = kernel.address_register
        self.scalars[at : at + 2] = address & 0xFFFFFFFF, address >> 32
        words = np.frombuffer(arguments, np.uint32, offset=4 * kernel.preload_offset)
        first = kernel.preload_register
        self.scalars[first : first + kernel.preloaded] = words[: kernel.preloaded]
        self.scalars[kernel.group_register] = self.view.group

    def give_memory(
        self, memory: Memory, lds: np.ndarray, lds_seen: np.ndarray, lds_size: int
    ) -> None:
        """Set what the wave can reach."""
        self.view.lds, self.view.lds_seen = lds.ctypes.data, lds_seen.ctypes.data
        self.view.lds_size = lds_size
        self.view.tensors, self.view.tensor_count = memory.table.ctypes.data, len(memory.table)

    @property
    def finished(self) -> bool:
        return self.view.state == FINISHED


def scalar_file() -> np.ndarray:
    """[256] poisoned scalar registers, all lanes active, and the inline constants."""
    scalars = np.zeros(256, np.uint32)
    scalars[:EXEC] = POISON
    scalars[EXEC : EXEC + 2] = 0xFFFFFFFF
    scalars[CONSTANTS : CONSTANTS + 65] = np.arange(65)
    scalars[193:209] = -np.arange(1, 17, dtype=np.int64) & 0xFFFFFFFF
    floats = [0.5, -0.5, 1, -1, 2, -2, 4, -4, 1 / (2 * np.pi)]
    scalars[240:249] = np.array(floats, np.float32).view(np.uint32)
    return scalars


def run_group(
    view: ProgramView, program: Program, waves: Sequence[Wave], random: Random | None
) -> None:
    """Run waves until all are finished; a barrier opens when all others wait at it."""
    run = machine().run_wave
    while not all(wave.finished for wave in waves):
        ready = [wave for wave in waves if not wave.finished and not wave.waits]
        if not ready:
            for wave in waves:
                wave.waits = False
            continue
        wave = ready[0] if random is None else random.choice(ready)
        budget = NO_LIMIT if random is None else random.choice((1, 3, 17, 120, 900))
        run(ctypes.byref(wave.view), ctypes.byref(view), budget)
        state = wave.view.state
        if state == AT_BARRIER:
            wave.waits = True
        elif state in FAULTS:
            at = wave.view.fault_counter
            raise (Race if state == RACE else Fault)(
                f"{FAULTS[state]}: {program.names[at] or 'no instruction'} at byte {4 * at:#x}, "
                f"address {wave.view.fault_address:#x}, workgroup {wave.view.group}, "
                f"wave {wave.view.wave}"
            )
