"""The specialised sweep compiled for a Hopper GPU, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from slow import slow_but
from specialised_cases import needs_clusters, needs_gluon

from benchmarks.hopper import sweep
from benchmarks.hopper.sweep import Form, check, compiled_for
from benchmarks.specialized import SPILL, loops, plain_inputs
from selfdistill_kernels import Objective
from selfdistill_kernels.backends.triton.problem import Problem
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.tools.audit.build import machine_code, read_nvidia
from selfdistill_kernels.tools.audit.judgement import refusals
from selfdistill_kernels.tools.audit.record import MACHINES

pytestmark = needs_gluon
HOPPER = MACHINES["sm_90"]
FORWARD = Objective("forward_kl", policy_gradient=1.0)


@needs_clusters
@pytest.mark.parametrize(
    ("objective", "cluster", "vocabulary"),
    slow_but(
        [(FORWARD, 2, 128256)],
        [
            (FORWARD, 2, 128256),
            (FORWARD, 1, 151670),
            (replace(FORWARD, divergence="reverse_kl"), 2, 151670),
            (replace(FORWARD, divergence="jsd"), 2, 151670),
        ],
    ),
)
def test_it_passes_the_audit(objective, cluster, vocabulary):
    """The shared memory and the registers that the design counted on, and its instructions."""
    compiled = compiled_for(plain_inputs(vocabulary), objective, HOPPER, Form(cluster))
    report = read_nvidia(compiled, compiled.metadata.num_warps, 0.0)
    assert refusals("sweep", report, "sm_90") == []
    assert (report.registers, report.warps) == (168, 12)  # before they are dealt out anew
    assert report.shared < 227 * 1024
    _, sass = machine_code(compiled)
    assert not SPILL.search(sass)
    consumers = [loop for loop in loops(sass) if loop.tensor]
    assert [loop.tensor for loop in consumers] == [8, 8]
    ptx = compiled.asm["ptx"]
    registers = re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)
    assert {"240", "24"} <= set(registers)
    copies = re.findall(r"cp\.async\.bulk\.tensor\S*", ptx)
    assert len(copies) == 5
    assert sum("multicast::cluster" in copy for copy in copies) == (cluster > 1)
    assert ptx.count("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16") == 16


def problem(machine=HOPPER, **changed) -> Problem:
    return Problem(replace(plain_inputs(256), **changed), FORWARD, machine)


def half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float16)


PLAIN = plain_inputs(256)


@pytest.mark.parametrize(
    ("refused", "told"),
    [
        (lambda: check(problem(MACHINES["sm_80"])), "device: .* is for sm_90.* this is sm_80"),
        (lambda: check(problem(student_hidden=half(PLAIN.student_hidden))),
         "student_hidden: expected torch.bfloat16, got torch.float16"),
        (lambda: check(problem(weight=PLAIN.weight[:, :100])),
         "weight: expected a hidden size that 64 divides, got 100"),
        (lambda: check(problem(teacher_hidden=None)), "teacher_hidden, weight: .* needs both"),
        (lambda: check(problem(teacher_weight=PLAIN.weight)), "teacher_weight: .* one head"),
        (lambda: check(problem(bias=PLAIN.weight[:, 0])), "bias: .* as they are"),
        (lambda: check(problem(transform=LogitTransform(temperature=0.9))), "transform: "),
        (lambda: Form(3), "cluster: expected 1 or 2, got 3"),
    ],
)  # fmt: skip
def test_what_it_cannot_take_is_refused_early(refused, told):
    with pytest.raises(ValueError, match=told):
        refused()


def test_an_old_triton_is_named(monkeypatch):
    monkeypatch.setattr(sweep.MULTICAST, "value", False)
    with pytest.raises(ValueError, match=r"came with Triton 3\.7, this is .*; take 1"):
        Form(2)
    assert Form(1).cluster == 1
    monkeypatch.setattr(sweep, "SPECIALISES", False)
    with pytest.raises(RuntimeError, match=r"needs Gluon of Triton 3\.6 or newer, this is "):
        Form(1)
