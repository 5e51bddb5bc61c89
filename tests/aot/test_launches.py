"""The audit compiles what Triton's launcher would: compared with the launcher's own rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import DIVERGENCES, make_case
from slow import slow_but
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
)
from selfdistill_kernels.backends import registry
from selfdistill_kernels.backends.triton import TritonBackend
from selfdistill_kernels.backends.triton.gather import gather_kernel
from selfdistill_kernels.backends.triton.launch import Warps
from selfdistill_kernels.backends.triton.plan import lanes
from selfdistill_kernels.tools.audit.record import (
    MACHINES,
    POINTER_RANGE_BYTES,
    Job,
    Variant,
    job_of,
    jobs,
)

Told = dict[str, tuple[str, Any]]
LAUNCHED = (
    Objective("forward_kl"),
    Objective("skew_kl", 0.3),
    Objective("reverse_kl", entry_clip=0.05),
)


def target(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, lanes(architecture))
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), lanes(architecture))


def launchers_rule(kernel: Any, given: dict[str, Any], architecture: str) -> Told:
    """Type and attributes of each argument, or its value as a constant."""
    backend = make_backend(target(architecture))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, _ = bind(**given)
    told: Told = {}
    for parameter, (kind, key) in zip(kernel.params, specialization, strict=True):
        if kind == "constexpr":
            told[parameter.name] = kind, key
        else:
            told[parameter.name] = kind, backend.parse_attr(key) if isinstance(key, str) else []
    return told


def audits_rule(job: Job) -> Told:
    constants = dict(job.constants)
    told: Told = {}
    for number, (name, kind) in enumerate(job.signature):
        if kind == "constexpr":
            told[name] = kind, constants[name]
        else:
            told[name] = kind, job.attributes.get((number,), [])
    return told


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """backend="triton" compares the two rules at each launch; returns the kernels it saw."""

    def start(architecture: str) -> list[str]:
        seen: list[str] = []

        def compare(kernel, programs, shape, arguments, constants):
            given = {**arguments, **constants}
            job = job_of(kernel, shape, arguments, constants, architecture)
            assert audits_rule(job) == launchers_rule(kernel, given, architecture), job.name
            for value in arguments.values():  # what the kernel would have written
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    value.nan_to_num_()
            seen.append(job.name)

        monkeypatch.setattr(registry, "_FOUND", replace(registry.found(), interprets=True))
        defaults = (MACHINES[architecture], compare, None)
        monkeypatch.setattr(TritonBackend.__init__, "__defaults__", defaults)
        return seen

    return start


@pytest.mark.parametrize("architecture", MACHINES)
@pytest.mark.parametrize("tokens", [1, 7, 16])
def test_every_argument_of_every_launch(compared, architecture, tokens):
    """Sizes that are 1, odd and multiples of 16; slices that start off a boundary; tensor
    descriptors; absent tensors; scalars of any value."""
    seen = compared(architecture)
    for hidden, vocabulary in ((16, 128), (9, 77), (1, 1)):
        for objective in LAUNCHED:
            for extras in ({}, {"bias": True, "softcap": 5.0, "teacher_hidden": 24}):
                case = make_case(tokens, hidden, vocabulary, dtype=torch.bfloat16, **extras)
                for gate in (None, AdvantageMask(0.0)):
                    leaves = case.leaves()
                    out = case.call(
                        fused_linear_distillation, objective=objective,
                        advantage_mask=gate, backend="triton",
                    )  # fmt: skip
                    torch.autograd.grad(out.loss, leaves)
    logits = torch.randn(tokens, 77, requires_grad=True)
    distillation_from_logits(logits, logits.detach(), backend="triton").loss.backward()
    assert set(seen) == {
        "sweep", "mixture", "gradient", "product", "merge", "merge_mixture", "gather",
        "row_statistics", "row_gradient",
    }  # fmt: skip


@pytest.mark.parametrize(("architecture", "is_told"), [("gfx942", True), ("sm_90", False)])
def test_storage_beyond_two_gibibytes(architecture, is_told):
    """The storage counts, not the part of it that a tensor shows; NVIDIA's compiler is not told."""
    tokens = torch.zeros(4, dtype=torch.int64)
    to = torch.zeros(4, 16)
    for size, near in ((POINTER_RANGE_BYTES - 3, True), (POINTER_RANGE_BYTES + 1, False)):
        source = torch.empty(size // 4, dtype=torch.float32)[:64].view(4, 16)
        given = {"source": source, "index": tokens, "to": to, "scale": None}
        given |= {"columns": 16, "stride": 16}
        arguments = {p.name: given[p.name] for p in gather_kernel.params if p.name in given}
        constants = {p.name: 16 for p in gather_kernel.params if p.name not in given}
        job = job_of(gather_kernel, Warps(), arguments, constants, architecture)
        told = launchers_rule(gather_kernel, {**arguments, **constants}, architecture)
        assert audits_rule(job) == told
        assert ("source" in job.near) == (near and is_told)


def test_the_audit_compiles_both_forms_of_the_head():
    """At the largest hidden size the head has more than 2 GiB, at the others it has less."""
    found = [
        job
        for job in jobs("gfx942", "bf16", chosen=[Variant(Objective("forward_kl"))])
        if job.name == "sweep"
    ]
    assert {"head" in job.far for job in found} == {True, False}
    assert all(set(job.far) <= {"head", "teacher_head"} for job in found)


@pytest.mark.parametrize("divergence", slow_but(["forward_kl"], DIVERGENCES))
def test_counts_behind_a_prefix_sum_lie_off_a_boundary(divergence):
    """The last of N int64 starts on a multiple of 16 bytes for odd N only."""
    found = jobs("sm_90", "bf16", [4096], [Variant(Objective(divergence, 0.3))])
    counting = [job for job in found if "count" in dict(job.signature)]
    assert counting
    assert not any("count" in job.aligned for job in counting)
