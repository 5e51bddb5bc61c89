"""The sweep of benchmarks/hopper, which no package uses: right or not, and beside today's.

Only where its own compiler and a Hopper GPU are at hand.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import median

import torch

from benchmarks.gpu.section import Section, WrongValueError
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.tiles import OBJECTIVE, random_inputs
from benchmarks.gpu.values import Case, check
from benchmarks.hopper.kernel import MULTICAST
from benchmarks.hopper.sweep import ARCHITECTURE, SPECIALISES, Form, SpecialisedBackend
from benchmarks.report import Table
from selfdistill_kernels.backends.triton.backend import TritonBackend
from selfdistill_kernels.backends.triton.plan import Machine
from selfdistill_kernels.statistics import Column

# N, H, V: many rounds of the ring and several items a program; whole tiles; ends; one token.
SIZES = ((1030, 64, 4099), (256, 192, 1024), (300, 192, 1531), (1, 64, 259))
OTHERS = ("reverse_kl", "skew_kl")
# Seconds for a form's problems of the forward KL, for one more problem, most of them the
# compiler's, and for the rounds.
FIRST, ONE, TIMED = 30.0, 15.0, 10.0


def forms() -> list[Form]:
    """Those that this Triton compiles."""
    return [Form(cluster) for cluster in ((2, 1) if MULTICAST.value else (1,))]


def case_of(objective: str, size: tuple[int, int, int]) -> Case:
    """A small problem; the largest has rows that are no token."""
    return Case("statistics", objective, "bfloat16", *size, masked=size == SIZES[0])


def compare_sweeps(setting: Setting, section: Section) -> None:
    """Check each form on small problems, then time those that are right in turns with today's.

    Raises:
        WrongValueError: the first wrong value.
    """
    found = Machine.of(torch.device(setting.device)).architecture
    if found != ARCHITECTURE:
        section.left_out.append(f"all of it: the kernel is for {ARCHITECTURE}, this is {found}")
        return
    if not SPECIALISES:
        section.left_out.append("all of it: the kernel needs Gluon of Triton 3.6 or newer")
        return
    right: dict[str, SpecialisedBackend] = {}
    for form in forms():
        name = f"specialised, clusters of {form.cluster}"
        if section.has_time(name, FIRST):
            backend = SpecialisedBackend(form)
            for size in SIZES:
                check_case(backend, name, case_of("forward_kl", size), setting.device)
            right[name] = backend
    if right and section.has_time("today's sweep beside it", TIMED):
        time_sweeps(setting, section, {"today's": TritonBackend(), **right})
    for name, backend in right.items():
        for objective in OTHERS:
            case = case_of(objective, SIZES[0])
            if section.has_time(f"{name}, {case.name}", ONE):
                check_case(backend, name, case, setting.device)


def check_case(backend: TritonBackend, name: str, case: Case, device: str) -> None:
    """Check one small problem.

    Raises:
        WrongValueError: a value is wrong.
    """
    try:
        check(case, device, backend)
    except WrongValueError as error:
        repeat = "python -m benchmarks.gpu --section specialised"
        wrong = replace(error.wrong, kernels=f"{name}, merge", repeat=repeat)
        raise WrongValueError(wrong) from None


def time_sweeps(setting: Setting, section: Section, backends: dict[str, TritonBackend]) -> None:
    """Medians of rounds in turns; the others are held against the first of `backends`."""
    inputs = random_inputs(setting.tuned, setting)
    sweeps = {
        name: partial(backend.statistics, inputs, OBJECTIVE, 0)
        for name, backend in backends.items()
    }
    first, *_ = results = [sweep()[:, Column.DIVERGENCE].double() for sweep in sweeps.values()]
    gaps = [float((own - first).abs().max() / first.abs().max()) for own in results]
    clock = setting.clock()
    rounds: dict[str, list[float]] = {name: [] for name in sweeps}
    for _ in range(setting.rounds):
        for name, sweep in sweeps.items():
            rounds[name].append(clock(sweep))
    shape = setting.tuned
    flops = 2 * 2.0 * shape.tokens * shape.hidden * shape.vocabulary
    seconds = {name: median(own) for name, own in rounds.items()}
    base = seconds[next(iter(sweeps))]
    body = [
        (name, f"{own * 1e3:.2f}", f"{base / own:.3f}", f"{flops / own / 1e12:.0f}", f"{gap:.1e}")
        for (name, own), gap in zip(seconds.items(), gaps, strict=True)
    ]
    head = ("sweep and merge", "ms", "times as fast", "TFLOP/s", "divergence beside today's")
    section.tables.append(Table(f"Forward KL, N/H/V {shape}, bfloat16, median", head, body))
    section.data.update(rounds=rounds, gaps=dict(zip(sweeps, gaps, strict=True)))
    section.save()
