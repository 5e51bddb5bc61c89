"""`Objective.entry_clip`: each entry's part of a divergence counts at most so much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    DIVERGENCES,
    check_against_torch,
    make_case,
    materialised_losses,
)

from selfdistill_kernels import (
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
)
from selfdistill_kernels.backends.dispatch import Choice, Found, decide

INF = float("inf")
CLIP = 0.05
# At which some rows of the problem of seed 3 are clipped and some are not.
CLIPS = dict.fromkeys(DIVERGENCES, CLIP) | {"jsd": 0.02}
TOKENS, HIDDEN, VOCABULARY = 23, 9, 57
# Too little for a row of both models: slabs of the vocabulary.
SLABS = {"workspace": 2000}
PATHS = {
    "one visit": {},
    "later": {"reduction": "none"},
    "slabs": SLABS,
    "slabs, later": {**SLABS, "reduction": "none"},
}
MIXED = {"beta": 0.3, "cross_entropy": 0.3, "entropy": 0.2, "policy_gradient": 0.1}


def clipped_rows(case, objective):
    """[N] bool, the tokens in which an entry is clipped."""
    without = replace(objective, entry_clip=None)
    return materialised_losses(case, objective)[1] != materialised_losses(case, without)[1]


def check(case64, objective, *, dtype=torch.float32, **options):
    """Losses, divergences and gradients against autograd of the definition."""
    bound = clipped_rows(case64, objective)
    assert bound.any(), "nothing is clipped"

    def plain(case):
        loss, divergence, _ = materialised_losses(case, objective)
        return {"loss": loss.mean(), "divergence": divergence}, loss.mean()

    def ours(case):
        out = case.call(fused_linear_distillation, objective=objective, **options)
        return {"loss": out.loss.mean(), "divergence": out.divergence}, out.loss.mean()

    size = float(materialised_losses(case64, objective)[0].abs().mean())
    check_against_torch(case64, plain, ours, dtype=dtype, loss_size=size)
    return bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("path", PATHS)
def test_values_and_gradients(divergence, path, backend):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, bias=True, seed=3, closeness=0.2)
    bound = check(
        case,
        Objective(divergence, entry_clip=CLIPS[divergence], **MIXED),
        backend=backend,
        **PATHS[path],
    )
    assert not bound.all(), "every row is clipped"
    alone = Objective(divergence, 0.7, entry_clip=0.002)
    check(replace(case, options={"temperature": 1.1}), alone, backend=backend, **PATHS[path])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_soft_cap_and_another_teacher(divergence, backend):
    capped = make_case(TOKENS, HIDDEN, 130, bias=True, seed=6, softcap=3.0, temperature=0.7)
    check(capped, Objective(divergence, entry_clip=0.01), backend=backend)
    other = make_case(TOKENS, HIDDEN, 130, seed=7, teacher_hidden=5)
    check(other, Objective(divergence, entry_clip=0.01), backend=backend)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("path", PATHS)
def test_bfloat16(divergence, path, backend):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, seed=8)
    objective = Objective(divergence, entry_clip=0.03)
    check(case, objective, dtype=torch.bfloat16, backend=backend, **PATHS[path])


@pytest.fixture(params=["avx512", "avx2", "default"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.ops.selfdistill.cpu_capability()
    try:
        torch.ops.selfdistill.set_cpu_capability(request.param)
    except RuntimeError as error:
        pytest.skip(f"{error}; run on one that has it")
    yield request.param
    torch.ops.selfdistill.set_cpu_capability(before)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("path", ["one visit", "slabs"])
def test_instruction_sets(divergence, path, instructions):
    # More than two blocks of the widest vectors, and a rest.
    case = make_case(5, 16, 2100, bias=True, seed=9, closeness=1.0, softcap=20.0)
    options = {} if path == "one visit" else {"workspace": 9000}
    check(case, Objective(divergence, entry_clip=0.02), backend="native", **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("path", PATHS)
def test_where_nothing_is_clipped_no_bit_changes(divergence, path, backend):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, bias=True, seed=4).cast(torch.float32)
    found = []
    for clip in (None, 40.0):
        leaves = case.leaves()
        out = case.call(
            fused_linear_distillation,
            objective=Objective(divergence, entry_clip=clip, **MIXED),
            backend=backend, **PATHS[path],
        )  # fmt: skip
        found.append([out.loss, out.divergence, *torch.autograd.grad(out.loss.sum(), leaves)])
    for without, beside in zip(*found, strict=True):
        assert torch.equal(without, beside)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_without_a_clipped_entry_keep_their_bits(divergence, backend):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, seed=3, closeness=0.2)
    bound = clipped_rows(case, Objective(divergence, 0.3, entry_clip=CLIPS[divergence]))
    assert bound.any()
    case = case.cast(torch.float32)
    logits = [h @ case.weight.T for h in (case.student_hidden, case.teacher_hidden)]
    gradients = []
    for clip in (None, CLIPS[divergence]):
        leaf = logits[0].clone().requires_grad_()
        objective = Objective(divergence, 0.3, entry_clip=clip)
        out = distillation_from_logits(leaf, logits[1], objective=objective, backend=backend)
        gradients.append(torch.autograd.grad(out.loss, leaf)[0])
    same = (gradients[0] == gradients[1]).all(dim=1)
    assert torch.equal(same, ~bound)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_edge(divergence, backend):
    # The largest part of a row, from a little below the clip to a little above it.
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 1, 40, generator=generator, dtype=torch.float64)

    def parts(z):
        log_s, log_t = z.log_softmax(1), teacher.log_softmax(1)
        mixture = torch.logaddexp(log_s, log_t) - torch.tensor(2.0).log()
        of_t = log_t.exp() * (log_t - (log_s if divergence == "forward_kl" else mixture))
        of_s = log_s.exp() * (log_s - (log_t if divergence == "reverse_kl" else mixture))
        return {"jsd": (of_t + of_s) / 2, "skew_kl": of_t, "forward_kl": of_t}.get(divergence, of_s)

    largest = float(parts(student).max())
    gradients = []
    for factor in (1 - 1e-3, 1 + 1e-3):
        clip = factor * largest
        leaf = student.clone().requires_grad_()
        (exact,) = torch.autograd.grad(parts(leaf).clamp(max=clip).sum(), leaf)
        leaf = student.float().requires_grad_()
        out = distillation_from_logits(
            leaf, teacher.float(), objective=Objective(divergence, entry_clip=clip),
            reduction="sum", backend=backend,
        )  # fmt: skip
        gradients.append(torch.autograd.grad(out.loss, leaf)[0])
        torch.testing.assert_close(gradients[-1].double(), exact, rtol=1e-5, atol=1e-6)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3, "the gradient jumps at the clip"


@pytest.mark.parametrize(
    ("divergence", "side"), [("forward_kl", 0), ("reverse_kl", 1), ("jsd", 0), ("skew_kl", 1)]
)
def test_an_infinite_part_is_clipped(divergence, side, backend):
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 4, 40, generator=generator)
    logits[side, 2, 5:9] = -INF
    objective = Objective(divergence, entry_clip=CLIP)
    leaf = logits[0].clone().requires_grad_()
    out = distillation_from_logits(
        leaf, logits[1], objective=objective, reduction="none", backend=backend
    )
    (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
    # By hand: what one model rules out has its limit, and no gradient where that is the clip.
    log_s, log_t = logits.double().log_softmax(2)
    p_s, p_t = log_s.exp(), log_t.exp()
    if divergence in ("forward_kl", "reverse_kl"):
        p, log_p, log_q = (p_t, log_t, log_s) if side == 0 else (p_s, log_s, log_t)
        part = torch.where(p > 0, p * (log_p - log_q), 0.0)
        slope = -p_t if side == 0 else p_s * (log_s - log_t + 1)
    else:
        mixture = 0.5 * (p_s + p_t)
        of_t = torch.where(p_t > 0, p_t * (log_t - mixture.log()), 0.0)
        of_s = torch.where(p_s > 0, p_s * (log_s - mixture.log()), 0.0)
        part = of_t if divergence == "skew_kl" else 0.5 * (of_t + of_s)
        slope = 0.5 * (-p_s * p_t / mixture if divergence == "skew_kl" else of_s)
    slope = torch.where(part > CLIP, 0.0, slope)
    torch.testing.assert_close(out.loss.detach().double(), part.clamp(max=CLIP).sum(1))
    exact = slope - p_s * slope.sum(1, keepdim=True)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_is_no_number_stays_in_its_token(divergence, backend):
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randn(2, 5, 40, generator=generator)
    found = []
    for broken in (False, True):
        leaf = student.clone()
        if broken:
            leaf[3, 7] = float("nan")
        leaf.requires_grad_()
        out = distillation_from_logits(
            leaf, teacher, objective=Objective(divergence, entry_clip=0.01), reduction="none",
            backend=backend,
        )  # fmt: skip
        found.append((out.loss.detach(), torch.autograd.grad(out.loss.sum(), leaf)[0]))
    others = [0, 1, 2, 4]
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean[others], dirty[others])
        assert dirty[3].isnan().any()


def test_masked_tokens_count_nothing(backend):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, seed=3)
    mask = torch.arange(TOKENS) % 3 != 0
    for options in PATHS.values():
        objective = Objective("forward_kl", entry_clip=CLIP)

        def plain(case, objective=objective):
            loss = materialised_losses(case, objective)[0][mask].mean()
            return {"loss": loss}, loss

        def ours(case, objective=objective, options=options):
            out = case.call(
                fused_linear_distillation, objective=objective, mask=mask, backend=backend,
                **options,
            )  # fmt: skip
            loss = out.loss.sum() / (mask.sum() if "reduction" in options else 1)
            return {"loss": loss}, loss

        check_against_torch(case, plain, ours, loss_size=0.5)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_buckets_of_a_top_k(divergence, backend):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, seed=3)
    check(case, Objective(divergence, top_k=9, entry_clip=0.02), backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_and_transformed(reduction):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, seed=3).cast(torch.float32)
    objective = Objective("forward_kl", entry_clip=CLIP)

    def loss(hidden):
        out = fused_linear_distillation(
            hidden, case.teacher_hidden, case.weight, case.targets, objective=objective,
            reduction=reduction, backend="native",
        )  # fmt: skip
        return out.loss.mean()

    leaf = case.student_hidden.requires_grad_()
    (eager,) = torch.autograd.grad(loss(leaf), leaf)
    (compiled,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(leaf), leaf)
    transformed = torch.func.grad(loss)(leaf.detach())
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(transformed, eager)


def test_the_clip_can_turn_the_gradient_round(backend):
    # docs/objectives.md: with two entries the loss falls where the student leaves the teacher.
    teacher = torch.tensor([[0.9, 0.1]]).log()
    student = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    steps = {}
    for clip in (None, CLIP):
        out = distillation_from_logits(
            student, teacher, objective=Objective("forward_kl", entry_clip=clip), backend=backend
        )
        (gradient,) = torch.autograd.grad(out.loss, student)
        steps[clip] = -gradient[0, 0]
        if clip is not None:
            assert out.loss < 0
    assert steps[None] > 0 > steps[CLIP]


def test_refusals():
    with pytest.raises(ValueError, match="entry_clip must be > 0"):
        Objective(entry_clip=0.0)
    with pytest.raises(ValueError, match="entry_clip limits the entries of a divergence"):
        Objective("none", cross_entropy=1.0, entry_clip=0.1)
    case = make_case(3, 4, 11).cast(torch.float32)
    with pytest.raises(ValueError, match="gradient_tolerance: an objective with entry_clip"):
        case.call(
            fused_linear_distillation, objective=Objective(entry_clip=0.1), gradient_tolerance=1e-2
        )


def test_backends_that_clip_no_entries():
    everything = Found(triton_problem=None, native_problem=None, cuda_problem=None)
    options = {"dtype": torch.float32, "found": everything, "clips_entries": True}
    for name in ("triton", "native"):
        with pytest.raises(ValueError, match=f"'{name}' on 'cuda' takes no objective with entry_c"):
            decide(name, device="cuda", **options)
    assert decide("auto", device="cuda", **options) == Choice("reference")
    assert decide("auto", device="cpu", **options) == Choice("native")
