"""A whole training step without the optimiser: padded rows beside shared prefixes, per attention.

The gradients of each way are first compared with those of the padded rows in float32, on a smaller
model; then the real one is timed and its memory measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.section import Section, Wrong, WrongValueError
from benchmarks.gpu.setting import Setting
from benchmarks.memory import MEBIBYTE, measure
from benchmarks.report import Table
from benchmarks.step import ModelSize, Step, StepProblem, StepShape, naive, shared, step_flops
from benchmarks.timing import interleave
from selfdistill.model.attention import BACKENDS, UnavailableBackendError, choose_backend

CHECK = StepShape(24, 16, 8, 3)
CHECKED_LAYERS = 2
# The gradient of each way may be this many times as far from float32's as the padded rows' is.
FACTOR, LEAST = 3.0, 1e-4


def ways(setting: Setting, section: Section) -> dict[str, Callable[[StepProblem], Step]]:
    """How the step can be computed here, by name; the others are told."""
    found: dict[str, Callable[[StepProblem], Step]] = {"padded rows, sdpa": naive}
    for name in BACKENDS:
        try:
            choose_backend(
                name, device=setting.device, dtype=setting.step_dtype,
                head_dim=setting.model["head_dim"],
            )  # fmt: skip
        except UnavailableBackendError as error:
            section.left_out.append(f"shared prefix, {name}: {error}")
        else:
            found[f"shared prefix, {name}"] = partial(shared, attention=name)
    return found


def measure_steps(setting: Setting, section: Section) -> None:
    """Check, time, measure.

    Raises:
        WrongValueError: the gradient of a way is another.
    """
    known = ways(setting, section)
    if not section.has_time("the training step", 30.0):
        return
    section.data["gradient errors"] = check(setting, known)
    section.save()
    problem = StepProblem(
        StepShape.parse(setting.step),
        ModelSize(**setting.model),
        setting.device,
        setting.step_dtype,
    )
    steps = {}
    for name, build in known.items():
        if section.has_time(name, 20.0):
            steps[name] = build(problem)
            steps[name]()  # compiles
    timings = interleave(steps, setting.rounds, clock=setting.clock())
    body: list[tuple[str, ...]] = []
    head = ("", "ms", "spread", "vs padded", "TFLOP/s of its own flops", "peak extra MiB")
    section.tables.append(
        Table(
            f"Training step, P/R/C/G {setting.step}, {dict(setting.model)}, {setting.step_dtype}",
            head,
            body,
        )
    )
    for name, step in steps.items():
        timing = timings[name]
        flops = step_flops(problem, share=name.startswith("shared")).total
        peak = measure(partial(_alone, step), setting.device)
        speedup = timings["padded rows, sdpa"].over(timing)
        body.append(
            (name, f"{timing.median * 1e3:.2f}", f"{timing.spread:.0%}", f"{speedup:.2f}x",
             f"{flops / timing.median / 1e12:.1f}", f"{peak / MEBIBYTE:.0f}")
        )  # fmt: skip
        section.data[name] = {
            "seconds": timing.seconds, "flops": flops, "peak extra bytes": peak
        }  # fmt: skip
        section.save()


def check(setting: Setting, known: dict[str, Callable[[StepProblem], Step]]) -> dict[str, float]:
    """Largest difference of a gradient from float32's, over that gradient's largest entry."""
    size = ModelSize(**setting.model)
    size = replace(size, layers=min(CHECKED_LAYERS, size.layers))
    exact = _gradients(naive, StepProblem(CHECK, size, setting.device))
    problem = StepProblem(CHECK, size, setting.device, setting.step_dtype)
    errors: dict[str, float] = {}
    for name, build in known.items():
        made = _gradients(build, problem)
        by_parameter = {key: _error(made[key], want) for key, want in exact.items()}
        worst = max(by_parameter, key=lambda key: (by_parameter[key] != by_parameter[key],
                                                   by_parameter[key]))  # fmt: skip
        errors[name] = error = by_parameter[worst]
        padded = errors["padded rows, sdpa"]
        allowed = float("inf") if name == "padded rows, sdpa" else FACTOR * padded + LEAST
        if not error <= allowed:
            gap = (made[worst].double() - exact[worst].double()).abs()
            flat = gap.nan_to_num(nan=float("inf")).argmax()
            entry = tuple(int(i) for i in torch.unravel_index(flat, gap.shape))
            raise WrongValueError(
                Wrong(
                    kernels=f"{name} and the fused loss",
                    problem=f"training step, P/R/C/G {CHECK}, {size}, {setting.step_dtype}",
                    result=f"gradient of {worst}",
                    entry=entry,
                    expected=float(exact[worst][entry]),
                    got=float(made[worst][entry]),
                    error=error,
                    allowed=allowed,
                    plain=padded,
                    repeat="python -m benchmarks.gpu --section step",
                )
            )
    return errors


def _alone(step: Step) -> list[Tensor]:
    return [step()]


def _gradients(build: Callable[[StepProblem], Step], problem: StepProblem) -> dict[str, Tensor]:
    build(problem)()
    return {
        name: parameter.grad.detach().cpu()
        for name, parameter in problem.model.named_parameters()
        if parameter.grad is not None
    }


def _error(made: Tensor, exact: Tensor) -> float:
    made, exact = made.double(), exact.double()
    return float((made - exact).abs().max() / exact.abs().max().clamp(min=1e-30))
