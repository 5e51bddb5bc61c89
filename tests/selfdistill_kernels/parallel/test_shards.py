"""Heads in shards on 2 and 4 ranks give the results of one process, losses and gradients.

All problems of a number of ranks run in one start of its processes; the tests look their own up.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exactness import assert_no_worse_than_torch
from kernel_cases import (
    DIVERGENCES,
    Case,
    Compute,
    assert_results,
    make_case,
    materialised_losses,
    plain_results,
    results,
)
from process_groups import in_processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from selfdistill_kernels import (
    AdvantageMask,
    FusedLinearDistillationLoss,
    Objective,
    fused_linear_distillation,
    fused_linear_logprobs,
)

BACKENDS = ("reference", "native")
FORMS = ("group", "dtensor")
STATISTICS = ("divergence", "student_logprob", "teacher_logprob", "entropy", "teacher_entropy")
SPLITS = {2: (0, 30, 101), 4: (0, 30, 34, 80, 101)}  # of plain shards


@dataclass(frozen=True)
class Problem:
    """One call; `case` are the arguments of make_case."""

    objective: Objective
    case: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


# Those whose plain torch is written in kernel_cases.py.
PLAIN = {
    **{name: Problem(Objective(name, beta=0.3), {"bias": True}) for name in DIVERGENCES},
    "mix": Problem(
        Objective("forward_kl", policy_gradient=0.3, cross_entropy=0.2, entropy=-0.1),
        {"bias": True},
    ),
    "cross entropy": Problem(Objective("none", cross_entropy=1.0)),
    "transform": Problem(
        Objective("jsd", cross_entropy=0.5),
        {"logit_scale": 1.7, "softcap": 6.0, "temperature": 1.3},
    ),
    "another head": Problem(Objective("reverse_kl"), {"teacher_hidden": 9}),
    "close": Problem(Objective("skew_kl", beta=0.1), {"closeness": 0.01}),
    # More than the smallest shard has.
    "top-k": Problem(Objective("forward_kl", top_k=12, cross_entropy=0.3), {"bias": True}),
    "top-k of the teacher": Problem(Objective("jsd", top_k=5, top_k_of="teacher")),
    "top-k without tail": Problem(Objective("reverse_kl", top_k=9, tail=False, entropy=0.1)),
    "slabs": Problem(Objective("jsd", beta=0.3), {"tokens": 40}, {"workspace": 7000}),
    "clipped entries": Problem(Objective("forward_kl", entry_clip=0.05, entropy=0.1)),
    "clipped entries of a mixture": Problem(Objective("skew_kl", beta=0.2, entry_clip=0.05)),
}
PLAIN_JSD = Problem(Objective("jsd"))
# Hidden states as DTensors: of a plain body, and of one with sequence parallelism.
HIDDEN = {"replicated": Replicate(), "in parts": Shard(0)}
MASK = torch.tensor([1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
# Those that are compared with one process.
OTHERS = {
    "jsd of beta 0": Problem(Objective("jsd", beta=0.0)),
    "jsd of beta 1": Problem(Objective("jsd", beta=1.0)),
    "mask": Problem(Objective("jsd", cross_entropy=0.5), {}, {"mask": MASK}),
    "top-k and a mask": Problem(Objective("jsd", top_k=5), {}, {"mask": MASK}),
    "advantage mask": Problem(
        Objective(), {}, {"advantage_mask": AdvantageMask(0.1, "negative"), "mask": MASK}
    ),
    "top fraction": Problem(
        Objective(), {}, {"advantage_mask": AdvantageMask(top_fraction=0.5), "reduction": "sum"}
    ),
    "clipped": Problem(Objective("reverse_kl", divergence_clip=0.9)),
    "importance": Problem(
        Objective("forward_kl", importance_clip=1.5), {}, {"old_logprobs": torch.full((7,), -4.0)}
    ),
    "no reduction": Problem(Objective("jsd"), {}, {"reduction": "none"}),
    "no token": Problem(Objective("jsd"), {"tokens": 0}),
}


def case_of(problem: Problem) -> Case:
    """In float64; rows that the mask drops hold what must not be read."""
    case = make_case(**problem.case)
    if "mask" in problem.options:
        case.student_hidden[~MASK] = case.teacher_hidden[~MASK] = torch.nan
    return case


def shard(case: Case, rank: int, form: str) -> tuple[Case, dict[str, Any]]:
    """The rank's part of a case, and the options that say so."""
    ranks = dist.get_world_size()
    heads = {name: getattr(case, name) for name in ("weight", "teacher_weight", "bias")}
    heads = {name: head.detach() for name, head in heads.items() if head is not None}
    if form == "group":
        rows = slice(*SPLITS[ranks][rank : rank + 2])
        parts = {name: head[rows].clone() for name, head in heads.items()}
        return replace(case, **parts), {"group": dist.group.WORLD}
    mesh = init_device_mesh("cpu", (ranks,))
    parts = {name: distribute_tensor(head, mesh, [Shard(0)]) for name, head in heads.items()}
    return replace(case, **parts), {}


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def solve(case: Case, problem: Problem, **options: Any) -> dict[str, Tensor]:
    def compute(case: Case) -> tuple[dict[str, Tensor], Tensor]:
        out = case.call(
            fused_linear_distillation, objective=problem.objective, **problem.options, **options
        )
        values = {"loss": out.loss, **{name: getattr(out, name) for name in STATISTICS}}
        return values, out.loss.sum()

    found = results(case, compute)
    hidden = found["d student_hidden"]
    if isinstance(hidden, DTensor):
        found["d student_hidden"] = hidden.full_tensor()
    return {name: local(value) for name, value in found.items()}


def logprobs(case: Case, **options: Any) -> dict[str, Tensor]:
    def compute(case: Case) -> tuple[dict[str, Tensor], Tensor]:
        found = fused_linear_logprobs(
            case.student_hidden, case.weight, case.targets, bias=case.bias, **options
        )
        return found._asdict(), (found.logprobs - 0.3 * found.entropy).mean()

    return {name: local(value) for name, value in results(case, compute).items()}


def banned(case: Case) -> Case:
    """All entries of the second of four ranks, and some of the others, have no probability."""
    bias = torch.zeros(101, dtype=case.weight.dtype)
    bias[SPLITS[4][1] : SPLITS[4][2]] = bias[3] = bias[100] = -torch.inf
    return replace(case, bias=bias)


EXPOSED = Problem(Objective("forward_kl"), {"teacher_hidden": 9}, {"reduction": "none"})


def exposed() -> Case:
    """The student alone rules out an entry of the last shard: an infinite forward KL."""
    case = make_case(**EXPOSED.case).cast(torch.float32)
    case.bias = torch.zeros(101)
    case.bias[99] = -torch.inf
    return case


def on_ranks(rank: int, _: None) -> dict[str, dict[str, Tensor]]:
    """Every problem, on this rank."""
    found = {}
    for form in FORMS:
        for backend in BACKENDS:
            where = f"{backend} {form}"
            for name, problem in {**PLAIN, **OTHERS}.items():
                part, how = shard(case_of(problem).cast(torch.float32), rank, form)
                found[f"{name} {where}"] = solve(part, problem, backend=backend, **how)
            part, how = shard(make_case(bias=True).cast(torch.float32), rank, form)
            found[f"logprobs {where}"] = logprobs(part, backend=backend, **how)
            part, how = shard(make_case(tokens=64).cast(torch.bfloat16), rank, form)
            found[f"bfloat16 {where}"] = solve(part, PLAIN_JSD, backend=backend, **how)
        for name in DIVERGENCES:
            part, how = shard(banned(make_case().cast(torch.float32)), rank, form)
            problem = Problem(Objective(name, beta=0.3))
            found[f"banned {name} {form}"] = solve(part, problem, **how)
        part, how = shard(make_case().cast(torch.float32), rank, form)
        module = FusedLinearDistillationLoss(objective="jsd")
        found[f"module {form}"] = {"loss": part.call(module, **how).loss}
        part, how = shard(exposed(), rank, form)
        found[f"exposed {form}"] = solve(part, EXPOSED, **how)
    for name, placement in HIDDEN.items():
        part, _ = shard(make_case().cast(torch.float32), rank, "dtensor")
        mesh = part.weight.device_mesh
        part = replace(
            part,
            student_hidden=distribute_tensor(part.student_hidden, mesh, [placement]),
            teacher_hidden=distribute_tensor(part.teacher_hidden, mesh, [placement]),
        )
        found[f"hidden {name}"] = solve(part, PLAIN_JSD)
    return found


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Tensor]]:
    """The results by name, with the ranks' parts of dW and db joined."""
    ranks = in_processes(on_ranks, None, tmp_path_factory.mktemp("ranks"), ranks=request.param)
    return {name: joined([each[name] for each in ranks]) for name in ranks[0]}


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    whole = {}
    for name, first in parts[0].items():
        every = [part[name] for part in parts]
        if name in ("d weight", "d bias"):
            whole[name] = torch.cat(every)
        else:
            assert all(torch.equal(first, other) for other in every), f"{name} differs over ranks"
            whole[name] = first
    return whole


def plain_torch(problem: Problem) -> Compute:
    """Loss and statistics of materialised logits."""

    def compute(case: Case) -> tuple[dict[str, Tensor], Tensor]:
        loss, divergence, extra = materialised_losses(case, problem.objective)
        values = {"divergence": divergence, **extra}
        return {"loss": loss.mean(), **{key: values[key] for key in STATISTICS}}, loss.mean()

    return compute


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PLAIN)
def test_losses_and_gradients(
    name: str, backend: str, form: str, found: dict[str, dict[str, Tensor]]
) -> None:
    problem = PLAIN[name]
    case64 = make_case(**problem.case)
    torchs, exact = plain_results(case64, plain_torch(problem))
    size = float(materialised_losses(case64, problem.objective)[0].abs().mean())
    assert_results(found[f"{name} {backend} {form}"], torchs, exact, loss_size=size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OTHERS)
def test_masks_and_weights(
    name: str, backend: str, form: str, found: dict[str, dict[str, Tensor]]
) -> None:
    problem = OTHERS[name]
    case64 = case_of(problem)
    one = solve(case64.cast(torch.float32), problem, backend="native")
    exact = solve(case64, problem)
    assert_results(found[f"{name} {backend} {form}"], one, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs(backend: str, form: str, found: dict[str, dict[str, Tensor]]) -> None:
    def plain(case: Case) -> tuple[dict[str, Tensor], Tensor]:
        scores = (case.student_hidden @ case.weight.T + case.bias).log_softmax(dim=1)
        entropy = -(scores.exp() * scores).sum(dim=1)
        chosen = scores.gather(1, case.targets[:, None])[:, 0]
        return {"logprobs": chosen, "entropy": entropy}, (chosen - 0.3 * entropy).mean()

    assert_results(found[f"logprobs {backend} {form}"], *plain_results(make_case(bias=True), plain))


@pytest.mark.parametrize("form", FORMS)
def test_module(form: str, found: dict[str, dict[str, Tensor]]) -> None:
    one = make_case().cast(torch.float32).call(fused_linear_distillation, objective="jsd").loss
    torch.testing.assert_close(found[f"module {form}"]["loss"], one)


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_states_as_dtensors(name: str, found: dict[str, dict[str, Tensor]]) -> None:
    torchs, exact = plain_results(make_case(), plain_torch(PLAIN_JSD))
    assert_results(found[f"hidden {name}"], torchs, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend: str, form: str, found: dict[str, dict[str, Tensor]]) -> None:
    """Against the loss of materialised bfloat16 logits, which plain tensor parallelism makes."""
    case64, plain = make_case(tokens=64), plain_torch(PLAIN_JSD)
    torchs, exact = (results(case64.cast(d), plain) for d in (torch.bfloat16, torch.float64))
    for key, ours in found[f"bfloat16 {backend} {form}"].items():
        floor = 0.0 if key.startswith("d ") else 1.0
        assert_no_worse_than_torch(
            key, ours, torchs[key].to(ours.dtype), exact[key], floor=floor, factor=1.0
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_rank_whose_entries_are_all_ruled_out(
    name: str, form: str, found: dict[str, dict[str, Tensor]]
) -> None:
    problem = Problem(Objective(name, beta=0.3))
    case64 = banned(make_case())
    one = solve(case64.cast(torch.float32), problem)
    exact = solve(case64, problem)
    ours = found[f"banned {name} {form}"]
    assert all(value.isfinite().all() for value in ours.values())
    assert_results(ours, one, exact)


@pytest.mark.parametrize("form", FORMS)
def test_an_infinite_divergence_is_seen_by_every_rank(
    form: str, found: dict[str, dict[str, Tensor]]
) -> None:
    one, ours = solve(exposed(), EXPOSED), found[f"exposed {form}"]
    assert one["loss"].isinf().all()
    for name, value in one.items():
        torch.testing.assert_close(ours[name], value, msg=name)
