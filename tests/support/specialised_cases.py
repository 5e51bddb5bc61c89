"""The specialised sweep on the emulator in place of a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gluon_emulator import launch
from torch import Tensor

from benchmarks.hopper.kernel import MULTICAST, specialised_sweep_kernel
from benchmarks.hopper.sweep import ARCHITECTURE, SPECIALISES, Form, prepared
from selfdistill_kernels.backends.triton.plan import MEBIBYTE, Machine
from selfdistill_kernels.backends.triton.problem import Problem, Selection

needs_gluon = pytest.mark.skipif(
    not SPECIALISES, reason="the kernel needs Gluon of Triton 3.6 or newer: install one"
)
needs_clusters = pytest.mark.skipif(
    not MULTICAST.value, reason="copies to a cluster need Triton 3.7 or newer: install one"
)
CLUSTERS = (1, pytest.param(2, marks=needs_clusters))


def hopper(multiprocessors: int) -> Machine:
    """A small one."""
    return Machine(ARCHITECTURE, multiprocessors, MEBIBYTE, descriptors=True)


def emulated_sweep(
    problem: Problem,
    selection: Selection,
    student: Tensor,
    teacher: Tensor,
    *,
    cluster: int,
    clusters: int = 1,
    seed: int = 0,
    edits: dict[str, tuple[str, str]] | None = None,
    told: dict[str, object] | None = None,
) -> Tensor:
    """Partial states [pieces, 11, capacity] from `clusters` of `cluster` programs each.

    told: constants that are given wrongly.
    """
    problem = replace(problem, machine=hopper(cluster * clusters))
    programs, arguments, constants = prepared(problem, selection, student, teacher, Form(cluster))
    arguments["partial"].fill_(float("nan"))
    launch(
        specialised_sweep_kernel,
        programs,
        arguments,
        {**constants, **(told or {})},
        cluster=cluster,
        seed=seed,
        edits=edits,
    )
    partial: Tensor = arguments["partial"]
    return partial
