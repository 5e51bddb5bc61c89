"""Top-k divergences: against float64 from the definition, against TRL, and their limits."""

from __future__ import annotations

import pytest
import torch
from exactness import assert_no_worse_than_torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DIVERGENCES,
    check_against_torch,
    make_case,
    materialised_losses,
    plain_results,
    results,
)

from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
)
from selfdistill_kernels.backends.native.plan import MEBIBYTE, copied_bytes
from selfdistill_kernels.backends.registry import native_problem

SHAPES = {
    "plain": {},
    "everything": {
        "bias": True,
        "temperature": 0.8,
        "logit_scale": 0.5,
        "softcap": 6.0,
        "teacher_hidden": 9,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("top_k_of", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_against_float64(divergence, top_k_of, tail, shape, backend):
    objective = Objective(
        divergence, beta=0.3, policy_gradient=0.4, cross_entropy=0.2, entropy=0.1,
        top_k=10, top_k_of=top_k_of, tail=tail,
    )  # fmt: skip
    check_against_torch(make_case(seed=5, **SHAPES[shape]), *both(objective, backend))


def both(objective, backend, **options):
    """The definition in plain torch, and ours."""

    def plain(case):
        loss, divergence, _ = materialised_losses(case, objective)
        return {"divergence": divergence}, loss.mean()

    def ours(case):
        out = case.call(fused_linear_distillation, objective=objective, backend=backend, **options)
        return {"divergence": out.divergence}, out.loss

    return plain, ours


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_trl_sdpo_top_k_loss(tail, alpha, backend):
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    def theirs(case):
        loss = compute_topk_self_distillation_loss(
            case.student_hidden @ case.weight.T,
            case.teacher_hidden @ case.weight.T.detach(),
            distillation_topk=8, distillation_alpha=alpha, distillation_add_tail=tail,
        )  # fmt: skip
        return {"divergence": loss.reshape(12)}, loss.mean()

    _, ours = both(Objective("jsd", beta=alpha, top_k=8, tail=tail), backend)
    check_against_torch(make_case(12, 16, 97, seed=21), theirs, ours)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_every_entry_is_the_whole_divergence(divergence, backend):
    whole, _ = both(Objective(divergence), backend)
    _, ours = both(Objective(divergence, top_k=33), backend)
    check_against_torch(make_case(vocabulary=33), whole, ours)


@given(
    k=st.integers(1, 40),
    tokens=st.integers(0, 9),
    slack=st.integers(0, 4000),
    seed=st.integers(0, 99),
    kept=st.integers(0, 511),
)
@settings(max_examples=60, deadline=None)
def test_small_workspaces_and_masks(k, tokens, slack, seed, kept):
    """Slabs of any size find the same support; tokens that do not exist are never read."""
    assert native_problem() is None, native_problem()
    case64 = make_case(tokens, 5, 40, seed=seed)
    mask = torch.tensor([bool(kept >> i & 1) for i in range(tokens)], dtype=torch.bool)
    objective = Objective("reverse_kl", top_k=k)

    def plain(case):
        # Of all entries nothing is left for the tail, whose logarithm autograd would make a NaN.
        defined = objective if k < 40 else Objective("reverse_kl")
        loss, divergence, _ = materialised_losses(case, defined)
        divergence, loss = (x.where(mask, torch.zeros_like(x)) for x in (divergence, loss))
        return {"divergence": divergence}, loss.sum() / max(int(mask.sum()), 1)

    case = case64.cast(torch.float32)
    case.student_hidden[~mask] = torch.nan
    _, ours = both(objective, "native", mask=mask, workspace=8 * 16 + copied_bytes(5, 2) + slack)
    torchs, exact = plain_results(case64, plain)
    # What is left for the tail may be small: its logarithm then has few digits, in plain torch,
    # too, whose error is luck on so few numbers. Once in a while it has no logarithm at all.
    assume(all(value.isfinite().all() for value in torchs.values()))
    for name, value in results(case, ours).items():
        assert_no_worse_than_torch(name, value, torchs[name], exact[name], floor=1.0, roundings=64)


def test_from_logits(backend):
    objective = Objective("forward_kl", top_k=6, top_k_of="teacher")

    def from_logits(case):
        out = distillation_from_logits(
            case.student_hidden @ case.weight.T, case.teacher_hidden @ case.weight.detach().T,
            objective=objective, backend=backend,
        )  # fmt: skip
        return {"divergence": out.divergence}, out.loss

    plain, _ = both(objective, backend)
    check_against_torch(make_case(seed=3), plain, from_logits)


def test_advantage_mask_drops_rows(backend):
    case = make_case(20, seed=8).cast(torch.float32)
    case.leaves()
    out = case.call(
        fused_linear_distillation, objective=Objective("reverse_kl", top_k=5),
        advantage_mask=AdvantageMask(top_fraction=0.3), backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, case.student_hidden)
    assert 0 < int(out.active.sum()) < 20
    assert torch.equal(gradient.ne(0).any(dim=1), out.active)


def test_bfloat16_is_as_good_as_float32_on_the_same_values(backend):
    """float32 statistics from bfloat16 inputs; gradients round as the full divergence's do."""
    plain, ours = both(Objective("forward_kl", top_k=12), backend)
    check_against_torch(make_case(30, 32, 200, seed=4), plain, ours, dtype=torch.bfloat16)


def test_a_bad_row_stays_alone(backend):
    case = make_case(5).cast(torch.float32)
    with torch.no_grad():
        case.student_hidden[2] = torch.inf
    case.leaves()
    out = case.call(
        fused_linear_distillation, objective=Objective("forward_kl", top_k=4), reduction="none",
        backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss.sum(), case.student_hidden)
    good = torch.tensor([True, True, False, True, True])
    assert torch.equal(out.divergence.isfinite(), good)
    assert torch.equal(gradient.isfinite().all(dim=1), good)


def test_no_logits_in_memory():
    """The workspace bounds what the sweep for the support takes, too."""
    assert native_problem() is None, native_problem()
    case = make_case(64, 8, 20_000, seed=1).cast(torch.float32)
    case.leaves()
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        case.call(
            fused_linear_distillation, objective=Objective("forward_kl", top_k=4),
            workspace=MEBIBYTE // 2, backend="native",
        ).loss.backward()  # fmt: skip
    assert seen
    assert max(seen) <= max(MEBIBYTE, 4 * case.weight.numel())  # [64, 20000] would be 5 MB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 3, "divergence": "none", "entropy": 1.0}, "needs a divergence"),
        ({"top_k": 3, "top_k_of": "both"}, "'student' or 'teacher'"),
    ],
)
def test_bad_objectives(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_more_entries_than_the_vocabulary():
    with pytest.raises(ValueError, match="top_k must be at most the vocabulary of 101, got 102"):
        make_case().call(fused_linear_distillation, objective=Objective(top_k=102))
