"""Every kernel and every objective against float64, one small problem after the other.

The rule is that of the tests: the largest error is at most three times that of plain torch in
float32 on the same device, plus roundings. float64 is the reference backend on the CPU, which the
tests hold against the definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.section import Wrong, WrongValueError
from selfdistill_kernels import (
    Objective,
    backends,
    fused_linear_distillation,
    fused_linear_logprobs,
)
from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.interface import Backend, Gradients, LinearInputs, Needs
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.statistics import Column

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MIXTURES = ("jsd", "skew_kl", "skew_reverse_kl")
# What runs on each path; the sweep's paths come first, so that the first wrong value has the
# smallest number of kernels that may be at fault.
PATHS = {
    "statistics": "gather, sweep, merge",
    "gradient": "gradient, product, gather (the statistics passed before)",
    "slabs": "gradient, library products",
    "gated": "sweep, merge, gradient, product, gather",
    "store": "row_statistics, row_gradient, gather, library products",
    "logits": "row_statistics, row_gradient",
    "top_k": "sweep, merge, gradient, product, and torch's topk",
    "logprobs": "gather, sweep, merge, gradient, product",
}
EVERYTHING = Objective("forward_kl", policy_gradient=0.3, cross_entropy=0.2, entropy=-0.1)
OBJECTIVES = {
    **{
        name: Objective(name, beta=0.3)
        for name in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")
    },
    "clipped_entries": Objective("forward_kl", entry_clip=0.05),
    "clipped_jsd": Objective("jsd", beta=0.3, entry_clip=0.01),
    "policy_gradient": Objective("none", policy_gradient=1.0),
    "everything": EVERYTHING,
}
# How many times plain torch's error, and roundings of the result's dtype beside it. Gradients are
# differences of probabilities that are close to each other, made with the GPU's approximate exp.
FACTOR, ROUNDINGS, GRADIENT_ROUNDINGS, ROUNDINGS_16_BITS = 3.0, 16.0, 128.0, 2.0


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        path: a key of PATHS.
        objective: a key of OBJECTIVES.
        dtype: a key of DTYPES.
        tokens, hidden, vocabulary: N, H, V.
        extras: a bias, a soft cap, a temperature, and a teacher with a smaller head of its own.
        masked: every third row is no token, and holds NaN.
    """

    path: str
    objective: str
    dtype: str
    tokens: int
    hidden: int
    vocabulary: int
    extras: bool = False
    masked: bool = False

    @property
    def name(self) -> str:
        """For the command line."""
        sizes = f"{self.tokens}/{self.hidden}/{self.vocabulary}"
        marks = f"{' extras' if self.extras else ''}{' masked' if self.masked else ''}"
        return f"{self.path} {self.objective} {self.dtype} {sizes}{marks}"

    @property
    def kernels(self) -> str:
        """Those that have a part in it."""
        objective = OBJECTIVES[self.objective]
        second = objective.divergence in MIXTURES or objective.entry_clip is not None
        mixture = second and "sweep" in PATHS[self.path]
        return PATHS[self.path] + (", mixture, merge_mixture" if mixture else "")


def cases(dtypes: Iterable[str], sizes: Mapping[str, tuple[int, int, int]]) -> list[Case]:
    """All problems, the most telling first.

    Args:
        dtypes: keys of DTYPES, best first.
        sizes: N, H and V of "plain" (whole tiles), "ragged", "one token" and "many".
    """
    found: dict[Case, None] = {}

    def add(path: str, objective: str, dtype: str, size: str, **marks: bool) -> None:
        found[Case(path, objective, dtype, *sizes[size], **marks)] = None

    for dtype in dtypes:
        for objective in OBJECTIVES:
            for path in ("statistics", "gradient", "store"):
                add(path, objective, dtype, "plain")
                add(path, objective, dtype, "ragged", extras=True, masked=True)
            add("logits", objective, dtype, "ragged", masked=True)
        for path in ("slabs", "gated"):
            for objective in ("forward_kl", "jsd", "everything"):
                add(path, objective, dtype, "ragged")
                add(path, objective, dtype, "many")
        for path in PATHS:
            add(path, "forward_kl", dtype, "one token")
            add(path, "forward_kl", dtype, "ragged", masked=True)
    return list(found)


def groups(chosen: Iterable[Case]) -> list[list[Case]]:
    """Cases that share compiled kernels, together; order is kept."""
    found: dict[tuple[str, str], list[Case]] = {}
    for case in chosen:
        found.setdefault((case.dtype, case.objective), []).append(case)
    return list(found.values())


def check_all(
    chosen: Iterable[Case], device: str, has_time: Callable[[str], bool]
) -> Iterator[tuple[Case, float]]:
    """Check one after the other; yields each with its largest share of the allowed error.

    Args:
        has_time: told a case's name before it begins; False ends all.

    Raises:
        WrongValueError: the first wrong value.
    """
    for case in chosen:
        if not has_time(case.name):
            return
        yield case, check(case, device)


def check(case: Case, device: str, backend: Backend | None = None) -> float:
    """Largest error over the allowed one.

    Args:
        backend: None is "triton"; another one for paths that need no more than a backend.

    Raises:
        WrongValueError: it is above 1, or not a number.
    """
    made = _inputs(case)
    exact = _results(case, backends.get_backend("reference"), "reference", _widened(made))
    there = _on(made, device)
    plain = _results(case, backends.get_backend("reference"), "reference", _float32(there))
    found = _results(case, backend or backends.get_backend("triton"), "triton", there)
    size = 1.0 + float(exact.pop("size"))
    plain.pop("size")
    found.pop("size")
    worst = 0.0
    for name, got in found.items():
        own = compare(case, name, got, exact[name], plain[name], size)
        worst = max(worst, own)
    return worst


def compare(
    case: Case, name: str, got: Tensor, exact: Tensor, plain: Tensor, logit_size: float
) -> float:
    """Error of one result over the allowed one.

    Args:
        got, exact, plain: of the kernels, of float64 and of plain torch in float32.
        logit_size: the size of a sum of logits; log-probs are no more exact than that allows.

    Raises:
        WrongValueError: it is above 1, or not a number.
    """
    is_gradient = name.startswith("d ")
    got64, exact64 = got.detach().cpu().double(), exact.double()
    # As exact as the dtype of the result lets plain torch be.
    plain64 = plain.detach().to(got.dtype).cpu().double()
    floor = 1e-30 if is_gradient else logit_size
    scale = max(float(exact64.abs().max()), floor) if exact64.numel() else floor
    # Hidden states are multiplied by tensor cores, which cut bits off at every few products.
    roundings = (GRADIENT_ROUNDINGS if is_gradient else ROUNDINGS) + case.hidden / 4
    if got.dtype.itemsize == 2:
        roundings = ROUNDINGS_16_BITS
    error, plain_error = (
        float((value - exact64).abs().max()) / scale if exact64.numel() else 0.0
        for value in (got64, plain64)
    )
    allowed = FACTOR * plain_error + roundings * torch.finfo(got.dtype).eps
    if error <= allowed:
        return error / allowed
    raise WrongValueError(
        _wrong(case, name, got64, exact64, error=error, allowed=allowed, plain=plain_error)
    )


def _wrong(
    case: Case,
    name: str,
    got: Tensor,
    exact: Tensor,
    *,
    error: float,
    allowed: float,
    plain: float,
) -> Wrong:
    # A NaN is the worst that there is.
    gap = (got - exact).abs().nan_to_num(nan=float("inf"))
    entry = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    return Wrong(
        kernels=case.kernels,
        problem=case.name,
        result=name,
        entry=entry,
        expected=float(exact[entry]),
        got=float(got[entry]),
        error=error,
        allowed=allowed,
        plain=plain,
        repeat=f"python -m benchmarks.gpu --section values --problem '{case.name}'",
    )


# ---- problems ------------------------------------------------------------------------------------


def _inputs(case: Case) -> LinearInputs:
    """On the CPU, in the case's dtype."""
    generator = torch.Generator().manual_seed(case.tokens + case.vocabulary)
    n, h, v = case.tokens, case.hidden, case.vocabulary
    dtype = DTYPES[case.dtype]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    head = randn(v, h) * (2.5 / h**0.5)
    student = randn(n, h)
    narrow = max(h - 64, h // 2) if case.extras else h
    teacher = student[:, :narrow] + 0.3 * randn(n, narrow)
    exists = torch.arange(n) % 3 != 1 if case.masked else None
    if exists is not None:
        student[~exists] = teacher[~exists] = float("nan")
    bias = randn(v).to(dtype) if case.extras else None
    transform = LogitTransform(temperature=1.3, softcap=9.0) if case.extras else LogitTransform()
    inputs = LinearInputs(
        student.to(dtype),
        teacher.to(dtype),
        head.to(dtype),
        head[:, :narrow].to(dtype).contiguous() if case.extras else None,
        bias,
        None,
        torch.randint(0, v, (n,), generator=generator),
        exists,
        transform,
    )
    if case.path != "logits":
        return inputs
    logits = ((hidden @ head.T).to(dtype) for hidden in (student, teacher))
    return replace(inputs, student_hidden=next(logits), teacher_hidden=next(logits), weight=None)


def _on(inputs: LinearInputs, device: str, dtype: torch.dtype | None = None) -> LinearInputs:
    changed: dict[str, Any] = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in vars(inputs).items()
        if isinstance(value, Tensor)
    }
    return replace(inputs, **changed)


def _widened(inputs: LinearInputs) -> LinearInputs:
    return _on(inputs, "cpu", torch.float64)


def _float32(inputs: LinearInputs) -> LinearInputs:
    return _on(inputs, str(inputs.device), torch.float32)


# ---- what comes out ------------------------------------------------------------------------------


def _results(case: Case, backend: Backend, name: str, inputs: LinearInputs) -> dict[str, Tensor]:
    """Every result of the case's path by name; "size" is the largest log of a sum."""
    objective = OBJECTIVES[case.objective]
    if case.path == "top_k":
        return _top_k(inputs, objective, name)
    if case.path == "logprobs":
        return _logprobs(inputs, name)
    needs = Needs(True, inputs.weight is not None, inputs.bias is not None)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(case.tokens, 3, generator=generator)
    weights[::4] = 0.0
    # Kernels are compiled without the terms that an objective does not have.
    has_likelihood = bool(objective.policy_gradient or objective.cross_entropy)
    has_terms = [objective.divergence != "none", has_likelihood, bool(objective.entropy)]
    weights = (weights * torch.tensor(has_terms)).to(inputs.device)
    statistics = backend.statistics(inputs, objective, 0)
    found = _columns(statistics)
    if case.path == "statistics":
        return found
    if case.path == "gradient":
        made = backend.gradient(inputs, objective, statistics, weights, needs, 0)
        return {"size": found["size"], **_gradients(made)}
    gate = Gate(0, _threshold(case)) if case.path == "gated" else None
    loss_weight = torch.rand(case.tokens, generator=generator).to(inputs.device)
    itemsize = inputs.student_hidden.element_size()
    workspace = 256 * case.tokens * itemsize if case.path == "slabs" else 1 << 40
    statistics, _, made = backend.visit(
        inputs, objective, gate, loss_weight, None, needs, workspace
    )
    return {**_columns(statistics), **_gradients(made)}


def _threshold(case: Case) -> float:
    """In the widest gap between the middle advantages, so that rounding lets no token in or out."""
    inputs = _widened(_inputs(case))
    statistics = backends.get_backend("reference").statistics(inputs, Objective(), 0)
    sizes = (statistics[:, Column.TEACHER_LOGPROB] - statistics[:, Column.STUDENT_LOGPROB]).abs()
    ordered = sizes.sort().values
    middle = ordered[ordered.numel() // 4 : max(3 * ordered.numel() // 4, 2)]
    if middle.numel() < 2:
        return 0.0
    gap = int(middle.diff().argmax())
    return float((middle[gap] + middle[gap + 1]) / 2)


def _columns(statistics: Tensor) -> dict[str, Tensor]:
    """What is the same for every backend: a shift and a pivot are each backend's own."""
    found = {}
    for model in ("STUDENT", "TEACHER"):
        shift, logsum = (statistics[:, Column[f"{model}_{part}"]] for part in ("SHIFT", "LOGSUM"))
        found[f"{model.lower()} log-sum-exp"] = shift + logsum
    for column in (
        Column.STUDENT_LOGPROB, Column.TEACHER_LOGPROB, Column.ENTROPY, Column.TEACHER_ENTROPY,
        Column.DIVERGENCE,
    ):  # fmt: skip
        found[column.name.lower().replace("_", " ")] = statistics[:, column]
    size = found["student log-sum-exp"].abs().max()
    return {"size": size, **found}


def _gradients(made: Gradients) -> dict[str, Tensor]:
    return {f"d {name}": value for name, value in made._asdict().items() if value is not None}


def _top_k(inputs: LinearInputs, objective: Objective, backend: str) -> dict[str, Tensor]:
    leaves = _leaves(inputs)
    assert inputs.teacher_hidden is not None
    out = fused_linear_distillation(
        leaves[0], inputs.teacher_hidden, leaves[1], inputs.targets, mask=inputs.exists,
        objective=replace(objective, top_k=min(9, inputs.vocabulary)), backend=backend,
    )  # fmt: skip
    made = torch.autograd.grad(out.loss, leaves)
    return {
        "size": out.divergence.detach().abs().max(), "loss": out.loss.detach()[None],
        "divergence": out.divergence.detach(), "d hidden": made[0], "d weight": made[1],
    }  # fmt: skip


def _logprobs(inputs: LinearInputs, backend: str) -> dict[str, Tensor]:
    leaves = _leaves(inputs)
    assert inputs.targets is not None
    out = fused_linear_logprobs(
        leaves[0], leaves[1], inputs.targets, mask=inputs.exists, backend=backend
    )
    total = (out.logprobs + 0.3 * out.entropy).sum()
    made = torch.autograd.grad(total, leaves)
    return {
        "size": out.logprobs.detach().abs().max(), "log-probs": out.logprobs.detach(),
        "entropy": out.entropy.detach(), "d hidden": made[0], "d weight": made[1],
    }  # fmt: skip


def _leaves(inputs: LinearInputs) -> list[Tensor]:
    assert inputs.weight is not None
    return [
        inputs.student_hidden.detach().requires_grad_(),
        inputs.weight.detach().requires_grad_(),
    ]
