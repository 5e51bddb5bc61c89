"""A launcher of the Triton backend that compiles for an AMD GPU and executes the machine code."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from amd_machine.code_object import Kernel, read_kernel
from amd_machine.execute import Counts, Schedule, execute
from amd_machine.lanes import LANES
from amd_machine.program import Program
from selfdistill_kernels.backends.triton.launch import Shape
from selfdistill_kernels.tools.audit.build import compile_job
from selfdistill_kernels.tools.audit.record import Job, job_of

_FORMATS = {
    "i1": "<B", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I",
    "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU: its code, decoded, and where its arguments lie.

    Attributes:
        arguments: offset and kind of each argument, hidden ones behind the kernel's own.
        lds: bytes of a workgroup.
    """

    job: Job
    kernel: Kernel
    program: Program
    arguments: Sequence[Mapping[str, Any]]
    lds: int


_compiled: dict[tuple[Any, ...], Compiled] = {}


def compile_for(job: Job, architecture: str) -> Compiled:
    """Compile and decode, once for each kernel of this process."""
    key = (architecture, *job.key)
    if key not in _compiled:
        made = compile_job(job, architecture)
        kernel = read_kernel(made.asm["hsaco"], job.kernel.__name__)
        text = re.search(
            r"\.amdgpu_metadata\n(.*)\n\s*\.end_amdgpu_metadata", made.asm["amdgcn"], re.S
        )
        assert text, "the compiler wrote no metadata"
        (described,) = yaml.safe_load(text[1])["amdhsa.kernels"]
        _compiled[key] = Compiled(
            job, kernel, Program.of(kernel.code), described[".args"], made.metadata.shared
        )
    return _compiled[key]


class Launched(NamedTuple):
    """One launch that was executed."""

    compiled: Compiled
    programs: int
    counts: Counts


@dataclass
class Machine:
    """Executes every launch of a TritonBackend.

    Attributes:
        architecture: "gfx942" or "gfx950".
        schedule: who runs when.
        told: gets a job before it is compiled and returns what is compiled in its place.
        change: gets a kernel before it runs and returns what runs in its place.
        launched: all launches so far.
    """

    architecture: str
    schedule: Schedule = field(default_factory=Schedule)
    told: Callable[[Job], Job] | None = None
    change: Callable[[Compiled], Compiled] | None = None
    launched: list[Launched] = field(default_factory=list)

    def __call__(
        self,
        kernel: Any,
        programs: int,
        shape: Shape,
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
    ) -> None:
        job = job_of(kernel, shape, arguments, constants, self.architecture)
        if self.told is not None:
            job = self.told(job)
        compiled = compile_for(job, self.architecture)
        if self.change is not None:
            compiled = self.change(compiled)
        values = [arguments[name] for name, kind in job.signature if kind != "constexpr"]
        kinds = [kind for _, kind in job.signature if kind != "constexpr"]
        waves = shape.warps
        counts = execute(
            compiled.program,
            compiled.kernel,
            arguments=_packed(compiled, kinds, values, programs, waves * LANES),
            groups=programs,
            waves=waves,
            lds=compiled.lds,
            tensors=[_bytes_of(v) for v in values if isinstance(v, Tensor) and v.numel()],
            schedule=self.schedule,
        )
        self.launched.append(Launched(compiled, programs, counts))


def _packed(
    compiled: Compiled, kinds: Sequence[str], values: Sequence[Any], programs: int, threads: int
) -> bytes:
    """Arguments as they lie in memory: the kernel's own, two scratch pointers, hidden ones."""
    hidden = {
        "hidden_block_count_x": programs, "hidden_block_count_y": 1, "hidden_block_count_z": 1,
        "hidden_group_size_x": threads, "hidden_group_size_y": 1, "hidden_group_size_z": 1,
        "hidden_grid_dims": 1,
    }  # fmt: skip
    size = max(
        compiled.kernel.arguments, 4 * (compiled.kernel.preloaded + compiled.kernel.preload_offset)
    )
    packed = bytearray(-(-size // 4) * 4)
    own = [a for a in compiled.arguments if not a[".value_kind"].startswith("hidden")]
    for place, kind, value in zip(own, kinds, values, strict=False):  # scratch pointers stay 0
        if isinstance(value, Tensor):
            struct.pack_into("<Q", packed, place[".offset"], value.data_ptr())
        else:
            struct.pack_into(_FORMATS[kind], packed, place[".offset"], value)
    for place in compiled.arguments:
        kind, at, length = place[".value_kind"], place[".offset"], place[".size"]
        if kind.startswith("hidden"):
            packed[at : at + length] = hidden.get(kind, 0).to_bytes(length, "little")
    return bytes(packed)


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """Address of the first element, and the one behind the last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
