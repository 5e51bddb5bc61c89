"""What the host code would launch: it runs on meta tensors, with a recorder for a launcher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import mangle_type

from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.interface import LinearInputs, Needs
from selfdistill_kernels.backends.triton import TritonBackend
from selfdistill_kernels.backends.triton.launch import Shape, compiler_options
from selfdistill_kernels.backends.triton.plan import MEBIBYTE, Machine, is_amd
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import DIVERGENCES, Objective

# Multiprocessors and cache of A100, H100 SXM, B200, RTX 5090, MI300X and MI350X; they decide grids,
# not code.
MACHINES = {
    "sm_80": Machine("sm_80", 108, 20 * MEBIBYTE, descriptors=False),
    "sm_90": Machine("sm_90", 132, 25 * MEBIBYTE, descriptors=True),
    "sm_100": Machine("sm_100", 148, 63 * MEBIBYTE, descriptors=True),
    "sm_120": Machine("sm_120", 170, 48 * MEBIBYTE, descriptors=True),
    "gfx942": Machine("gfx942", 304, 128 * MEBIBYTE, descriptors=False),
    "gfx950": Machine("gfx950", 256, 128 * MEBIBYTE, descriptors=False),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HIDDEN_SIZES = (1024, 2048, 4096, 8192)
TOKENS, VOCABULARY = 8192, 151_936
# Triton tells AMD's compiler which tensors lie in storage that 32-bit offsets reach: those are read
# through buffer instructions, which check bounds, and others by 64-bit addresses.
POINTER_RANGE_BYTES = 2**31 - 1


@dataclass(frozen=True)
class Variant:
    """A problem whose kernels are compiled.

    Attributes:
        objective: the loss.
        two_heads: the teacher has a head of its own.
        temperature: other than 1.
        extras: bias, temperature, the entropy term and a vocabulary that ends within a tile.
        capped: a soft cap.
        teacher: False for log-probs of one model.
    """

    objective: Objective
    two_heads: bool = False
    temperature: bool = False
    extras: bool = False
    capped: bool = False
    teacher: bool = True

    def __str__(self) -> str:
        parts = [
            self.objective.divergence if self.teacher else "log-probs",
            *(["two heads"] if self.two_heads else []),
            *(["clipped entries"] if self.objective.entry_clip is not None else []),
            *(["temperature"] if self.temperature else []),
            *(["extras"] if self.extras else []),
            *(["soft cap"] if self.capped else []),
        ]
        return ", ".join(parts)


def variants() -> list[Variant]:
    """Every divergence plain and with everything at once, and both with clipped entries; two of
    them with each extra alone."""
    found = []
    for name in DIVERGENCES:
        plain = Objective(name, 0.3, policy_gradient=1.0)
        full = replace(plain, entropy=0.1)
        found += [
            Variant(plain),
            Variant(full, extras=True, two_heads=True, capped=True),
        ]
        if name != "none":
            found += [
                Variant(replace(plain, entry_clip=0.05)),
                Variant(replace(full, entry_clip=0.05), extras=True, two_heads=True, capped=True),
            ]
        if name in ("forward_kl", "skew_kl"):
            found += [
                Variant(full, temperature=True),
                Variant(full, extras=True),
                Variant(full, extras=True, two_heads=True),
                Variant(full, extras=True, capped=True),
            ]
    return [*found, Variant(Objective("none", entropy=1.0), teacher=False)]


@dataclass(frozen=True)
class Job:
    """One kernel as the launcher would compile it.

    Attributes:
        kernel: the triton.jit function.
        signature: type of each argument, "constexpr" for constants.
        constants: their values.
        aligned: arguments that are multiples of 16.
        near: tensors that 32-bit offsets reach (AMD only).
        shape: compiler options.
        uses: the problems that launch it.
    """

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    near: tuple[str, ...]
    shape: Shape
    uses: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__.removesuffix("_kernel")

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two jobs the same code."""
        options = tuple(compiler_options(self.shape).items())
        return self.name, self.signature, self.constants, self.aligned, self.near, options

    @property
    def far(self) -> tuple[str, ...]:
        """Tensors that 32-bit offsets do not reach, or that nothing says so of."""
        return tuple(
            name for name, kind in self.signature if kind.startswith("*") and name not in self.near
        )

    @property
    def attributes(self) -> dict[tuple[int], list[list[Any]]]:
        """What Triton's compiler is told of each argument, by its position."""
        found: dict[tuple[int], list[list[Any]]] = {}
        for number, (name, _) in enumerate(self.signature):
            told: list[list[Any]] = []
            if name in self.aligned:
                told.append(["tt.divisibility", 16])
            if name in self.near:
                told.append(["tt.pointer_range", 32])
            if told:
                found[(number,)] = told
        return found


def jobs(
    architecture: str,
    dtype: str,
    hidden_sizes: Iterable[int] = HIDDEN_SIZES,
    chosen: Iterable[Variant] | None = None,
) -> list[Job]:
    """The distinct kernels of all variants. H is a runtime argument, so most sizes share code."""
    found: dict[tuple[Any, ...], Job] = {}
    for variant in variants() if chosen is None else chosen:
        for hidden in hidden_sizes:
            for job in _launches(MACHINES[architecture], DTYPES[dtype], hidden, variant):
                seen = found.get(job.key, job)
                uses = tuple(dict.fromkeys((*seen.uses, str(variant))))
                found[job.key] = replace(seen, uses=uses)
    return list(found.values())


class _NoLibraryProducts(TorchFunctionMode):
    """Leaves out torch.mm and torch.addmm with `out_dtype`: they launch no kernel of ours.

    On meta tensors torch 2.9 has neither of the two, and torch 2.11 no addmm.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        if "out_dtype" not in keywords:
            return function(*arguments, **keywords)
        *_, left, right = arguments
        shape = (left.shape[0], right.shape[1])
        made = keywords.get("out")
        if made is None:
            return left.new_empty(shape, dtype=keywords["out_dtype"])
        assert made.shape == shape
        return made


def _launches(machine: Machine, dtype: torch.dtype, hidden: int, variant: Variant) -> Iterator[Job]:
    recorded: list[Job] = []

    def record(
        kernel: Any,
        programs: int,
        shape: Shape,
        arguments: Mapping[str, Any],
        constants: Mapping[str, Any],
    ) -> None:
        recorded.append(job_of(kernel, shape, arguments, constants, machine.architecture))

    backend = TritonBackend(machine, record)
    inputs = _inputs(dtype, hidden, variant)
    bias = inputs.bias is not None
    needs = Needs(True, True, bias)
    weight = torch.empty(TOKENS, device="meta")
    objective = variant.objective
    with _NoLibraryProducts():
        if not variant.teacher:
            statistics = backend.statistics(inputs, objective, 0)
            terms = torch.empty(TOKENS, 3, device="meta")
            backend.gradient(inputs, objective, statistics, terms, needs, 0)
        else:
            backend.visit(inputs, objective, Gate(0, 0.0), weight, None, needs, 0)  # recompute
            backend.visit(inputs, objective, None, weight, None, needs, 1 << 40)  # store
            logits = torch.empty(TOKENS, VOCABULARY, dtype=dtype, device="meta")
            given = replace(
                inputs, student_hidden=logits, teacher_hidden=logits, weight=None,
                teacher_weight=None, bias=None, teacher_bias=None,
            )  # fmt: skip
            backend.visit(given, objective, None, weight, None, Needs(True, False, False), 0)
    yield from recorded


def _inputs(dtype: torch.dtype, hidden: int, variant: Variant) -> LinearInputs:
    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    vocabulary = VOCABULARY - 40 * variant.extras
    bias = empty(vocabulary) if variant.extras else None
    return LinearInputs(
        student_hidden=empty(TOKENS, hidden),
        teacher_hidden=empty(TOKENS, hidden) if variant.teacher else None,
        weight=empty(vocabulary, hidden),
        teacher_weight=empty(vocabulary, hidden) if variant.two_heads else None,
        bias=bias,
        teacher_bias=bias,
        targets=torch.empty(TOKENS, dtype=torch.int64, device="meta"),
        exists=torch.empty(TOKENS, dtype=torch.bool, device="meta"),
        transform=LogitTransform(
            temperature=0.9 if variant.extras or variant.temperature else 1.0,
            softcap=30.0 if variant.capped else None,
        ),
    )


def job_of(
    kernel: Any,
    shape: Shape,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    architecture: str,
) -> Job:
    """The specialisation that Triton's launcher would make of these arguments on a GPU.

    A test holds it to the launcher's own rule (tests/aot/test_launches.py).
    """
    given = {**arguments, **constants}
    signature, values, aligned, near = [], [], [], []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        is_number = isinstance(value, int) and not isinstance(value, bool)
        is_number = is_number and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_number and value == 1):
            signature.append((name, "constexpr"))
            values.append((name, value))
            continue
        signature.append((name, mangle_type(value)))
        if isinstance(value, Tensor):
            if _address(value) % 16 == 0:
                aligned.append(name)
            if is_amd(architecture) and value.untyped_storage().size() <= POINTER_RANGE_BYTES:
                near.append(name)
        elif is_number and value % 16 == 0:
            aligned.append(name)
    return Job(kernel, tuple(signature), tuple(values), tuple(aligned), tuple(near), shape)


def _address(tensor: Tensor) -> int:
    """Of the first element; a meta tensor is taken to lie where an allocator would put it."""
    if tensor.device.type == "meta":
        return int(tensor.storage_offset()) * tensor.element_size()
    return tensor.data_ptr()
