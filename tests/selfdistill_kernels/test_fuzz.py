"""Ten thousand random small problems: the native backend against the float64 oracle.

Shapes, masks, objectives, options, strategies and dtypes are drawn together, so that combinations
meet which nobody thought of. A failure prints the seed that makes the problem again.
"""

from __future__ import annotations

import random

import pytest
import torch
from kernel_cases import DIVERGENCES
from slow import slow_but

from selfdistill_kernels import AdvantageMask, Objective, fused_linear_distillation
from selfdistill_kernels.backends.native.plan import copied_bytes

PROBLEMS = 10_000
CHUNKS = 10  # inputs of chunks 0 and 5 are bfloat16
NARROW = 5  # one problem in so many has bfloat16 inputs
# Of the largest value, or of 1. On so few numbers plain float32 is exact by luck, so that its error
# is no measure; instead what is rounded how often. Logits reach 30, log-probs 60: each carries 60
# times the rounding 6e-8 of 1, a policy gradient the product of two, and a dozen problems of all
# come near a third of this. Gradients come back in the inputs' dtype, rounded by 2^-8 of their
# binade; where 16-bit products are used, so is the gradient of the logits on the way.
ROUNDINGS = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7}


def draw(seed: int) -> tuple[dict, dict]:
    """Tensors (float32, exact in bfloat16) and options of one problem."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tokens, vocabulary = rng.choice([1, 2, 3, 5, 9, 17]), rng.choice([1, 2, 7, 16, 33, 70])
    hidden, teacher_size = rng.choice([1, 3, 8]), rng.choice([None, None, 4])

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().float()

    student = randn(tokens, hidden)
    closeness = rng.choice([0.0, 1e-2, 1.0])
    tensors = {
        "student_hidden": student,
        "teacher_hidden": (student + closeness * randn(tokens, hidden)).bfloat16().float()
        if teacher_size is None
        else randn(tokens, teacher_size),
        "weight": randn(vocabulary, hidden),
        "teacher_weight": None if teacher_size is None else randn(vocabulary, teacher_size),
        "bias": randn(vocabulary) if rng.random() < 0.5 else None,
    }
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.8
    targets[torch.rand(tokens, generator=generator) < 0.1] = -100
    with_terms = rng.random() < 0.5
    options = {
        "targets": targets,
        "mask": mask if rng.random() < 0.7 else None,
        "token_weight": torch.rand(tokens, generator=generator) if rng.random() < 0.3 else None,
        "objective": Objective(
            rng.choice(DIVERGENCES),
            rng.choice([0.0, 0.1, 0.5, 1.0]),
            policy_gradient=rng.choice([0.0, 1.0]) if with_terms else 0.0,
            cross_entropy=rng.choice([0.0, 0.5]) if with_terms else 0.0,
            entropy=rng.choice([0.0, -0.1]) if with_terms else 0.0,
        ),
        "temperature": rng.choice([1.0, 0.6, 2.0]),
        "logit_scale": rng.choice([1.0, 0.5]),
        "softcap": rng.choice([None, None, 3.0]),
        "reduction": rng.choice(["mean", "sum", "none"]),
        # From a single pair of short slabs to the whole problem at once.
        "workspace": rng.choice(["auto", 8 * 16, 8 * vocabulary * 3 + 128]),
    }
    if options["workspace"] != "auto":
        sizes = [hidden] if teacher_size is None else [hidden, teacher_size]
        options["workspace"] += copied_bytes(max(sizes), 2)
        if seed % NARROW == 0:
            # float32 sums of dH, of a slab of dW, and as many widened columns of each head.
            options["workspace"] += 4 * tokens * hidden + 4 * 16 * (hidden + sum(sizes))
    if rng.random() < 0.4:
        options["advantage_mask"] = AdvantageMask(
            threshold=rng.choice([0.0, 0.3]),
            sign=rng.choice(["any", "negative", "positive"]),
            top_fraction=rng.choice([None, 0.5]),
        )
    return tensors, options


def run(tensors: dict, options: dict, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    """Loss, statistics and gradients."""
    made = {k: None if v is None else v.to(dtype) for k, v in tensors.items()}
    leaves = [made[k] for k in ("student_hidden", "weight", "bias") if made[k] is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    out = fused_linear_distillation(**made, **options, backend=backend)
    gradients = torch.autograd.grad(out.loss.sum(), leaves)
    return [out.active, out.loss, out.divergence, out.advantage, out.entropy, *gradients]


def borderline(active: torch.Tensor, exact: list[torch.Tensor], options: dict) -> bool:
    """A token whose advantage lies within rounding of the threshold, or of its rank's neighbour,
    may fall on either side: within five times ROUNDINGS, of a difference of two log-probs."""
    if torch.equal(active, exact[0]):
        return False
    gate = options["advantage_mask"]
    size = exact[3].abs()
    near = (size - gate.threshold).abs() < 1e-4
    if gate.top_fraction is not None:
        near |= (size[:, None] - size[None, :]).abs().add(torch.eye(len(size))).amin(1) < 1e-4
    return bool(near[active != exact[0]].all())


@pytest.mark.parametrize("chunk", slow_but([0, 1], range(CHUNKS)))
def test_random_problems(chunk):
    for seed in range(chunk, PROBLEMS, CHUNKS):
        tensors, options = draw(seed)
        dtype = torch.bfloat16 if seed % NARROW == 0 else torch.float32
        exact = run(tensors, options, torch.float64, "reference")
        ours = run(tensors, options, dtype, "native")
        if borderline(ours[0], exact, options):
            continue
        assert torch.equal(ours[0], exact[0]), f"active tokens differ, seed {seed}"
        for i, (a, b) in enumerate(zip(ours[1:], exact[1:], strict=True)):
            limit = ROUNDINGS[a.dtype] * b.abs().max().clamp(min=1.0) if b.numel() else 0.0
            error = (a.double() - b).abs().max() if b.numel() else 0.0
            assert error <= limit, f"result {i} is off by {error:.2e}, seed {seed}"
