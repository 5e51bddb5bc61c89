"""`Objective.entry_clip`: each entry's part of a divergence counts at most so much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from clip_cases import (
    CLIP,
    check_bits_of_rows,
    check_broken_token_alone,
    check_clip,
    check_edge,
    check_exactly_at_the_clip,
    check_infinite_part,
    check_unclipped_bits,
)
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


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("path", PATHS)
def test_values_and_gradients(divergence, path, backend):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, bias=True, seed=3, closeness=0.2)
    bound = check_clip(
        case,
        Objective(divergence, entry_clip=CLIPS[divergence], **MIXED),
        backend=backend,
        **PATHS[path],
    )
    assert not bound.all(), "every row is clipped"
    alone = Objective(divergence, 0.7, entry_clip=0.002)
    check_clip(replace(case, options={"temperature": 1.1}), alone, backend=backend, **PATHS[path])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_soft_cap_and_another_teacher(divergence, backend):
    capped = make_case(TOKENS, HIDDEN, 130, bias=True, seed=6, softcap=3.0, temperature=0.7)
    check_clip(capped, Objective(divergence, entry_clip=0.01), backend=backend)
    other = make_case(TOKENS, HIDDEN, 130, seed=7, teacher_hidden=5)
    check_clip(other, Objective(divergence, entry_clip=0.01), backend=backend)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("path", PATHS)
def test_bfloat16(divergence, path, backend):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, seed=8)
    objective = Objective(divergence, entry_clip=0.03)
    check_clip(case, objective, dtype=torch.bfloat16, backend=backend, **PATHS[path])


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
    check_clip(case, Objective(divergence, entry_clip=0.02), backend="native", **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("path", PATHS)
def test_where_nothing_is_clipped_no_bit_changes(divergence, path, backend):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, bias=True, seed=4)
    check_unclipped_bits(case, Objective(divergence, **MIXED), backend=backend, **PATHS[path])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_without_a_clipped_entry_keep_their_bits(divergence, backend):
    case = make_case(TOKENS, HIDDEN, VOCABULARY, seed=3, closeness=0.2)
    check_bits_of_rows(case, Objective(divergence, 0.3, entry_clip=CLIPS[divergence]), backend)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_edge(divergence, backend):
    check_edge(divergence, backend)


def test_exactly_at_the_clip():
    check_exactly_at_the_clip("native")


@pytest.mark.parametrize(
    ("divergence", "side"), [("forward_kl", 0), ("reverse_kl", 1), ("jsd", 0), ("skew_kl", 1)]
)
def test_an_infinite_part_is_clipped(divergence, side, backend):
    check_infinite_part(divergence, side, backend)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_is_no_number_stays_in_its_token(divergence, backend):
    check_broken_token_alone(divergence, backend)


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
    check_clip(case, Objective(divergence, top_k=9, entry_clip=0.02), backend=backend)


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
