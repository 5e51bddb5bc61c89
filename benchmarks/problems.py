"""The inputs of one benchmark: hidden states, a head, sampled tokens, advantage thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdistill_kernels import AdvantageMask

# Every contender computes these three the same way; `beta` is the name that TRL and Liger give
# them: beta KL(T||m) + (1-beta) KL(S||m) with the end points defined as forward and reverse KL.
BETAS: dict[str, float] = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
OBJECTIVES = (*BETAS, "cross_entropy")
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Standard deviation of the logits of a token that the model did not expect.
LOGIT_SCALE = 2.5
# The hidden state leans towards the sampled token by up to this much: entropies from near 0 to
# near log V, as in text.
LARGEST_BOOST = 8.0
# Distance of the teacher's hidden state from the student's, relative to its length.
TEACHER_DISTANCE = 0.2


@dataclass(frozen=True)
class Shape:
    """N tokens, hidden size H, vocabulary size V."""

    tokens: int
    hidden: int
    vocabulary: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read "N/H/V".

        Raises:
            ValueError: not three positive integers.
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"shape: expected N/H/V such as 512/576/49152, got {text!r}")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.tokens}/{self.hidden}/{self.vocabulary}"


SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": (Shape(512, 576, 49152), Shape(512, 1024, 151936), Shape(2048, 1024, 32000)),
    "cuda": (Shape(8192, 4096, 128256), Shape(8192, 2048, 151936), Shape(4096, 1024, 151936)),
}
CHECK_SHAPE = Shape(48, 32, 509)
# Libraries for cross entropy want multiples of 8; everything else is checked on odd sizes.
EVEN_CHECK_SHAPE = Shape(64, 64, 512)


@dataclass(frozen=True)
class Problem:
    """One problem; float tensors share a dtype and a device.

    Attributes:
        student_hidden: [N, H], requires a gradient.
        teacher_hidden: [N, H], correlated with the student's.
        weight: [V, H] lm_head of both, requires a gradient.
        targets: [N] int64, the sampled tokens.
        objective: one of OBJECTIVES.
    """

    student_hidden: Tensor
    teacher_hidden: Tensor
    weight: Tensor
    targets: Tensor
    objective: str

    @property
    def has_teacher(self) -> bool:
        """Whether the objective reads the teacher."""
        return self.objective in BETAS

    @property
    def shape(self) -> Shape:
        tokens, hidden = self.student_hidden.shape
        return Shape(tokens, hidden, self.weight.shape[0])

    def head(self, trained: bool) -> Tensor:
        """[V, H], with or without a gradient."""
        return self.weight if trained else self.weight.detach()

    def advantage_mask(self, rho: float) -> AdvantageMask:
        """The mask that keeps the round(rho N) tokens with the largest |A|.

        Raises:
            ValueError: rho outside (0, 1).
        """
        if not 0.0 < rho < 1.0:
            raise ValueError(f"rho: expected a share in (0, 1), got {rho}")
        size = self._advantages().abs().sort(descending=True).values.tolist()
        kept = min(max(round(rho * len(size)), 1), len(size) - 1)
        return AdvantageMask(threshold=(size[kept - 1] + size[kept]) / 2)

    def active(self, rho: float) -> Tensor:
        """[N] bool, the tokens that `advantage_mask(rho)` keeps."""
        return self._advantages().abs() > self.advantage_mask(rho).threshold

    @torch.no_grad()
    def _advantages(self) -> Tensor:
        """[N] log T(y) - log S(y), by plain torch in float32, a few rows at a time."""
        head = self.weight.float().T
        found = []
        for student, teacher, targets in zip(
            self.student_hidden.split(64),
            self.teacher_hidden.split(64),
            self.targets.split(64),
            strict=True,
        ):
            rows = torch.log_softmax(torch.stack([student, teacher]).float() @ head, dim=-1)
            logprobs = rows.gather(2, targets.expand(2, -1)[..., None])[..., 0]
            found.append(logprobs[1] - logprobs[0])
        return torch.cat(found)


def make_problem(
    shape: Shape,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    objective: str = "reverse_kl",
    seed: int = 0,
) -> Problem:
    """Correlated student and teacher with logits of a language model's scale.

    Raises:
        ValueError: an objective that the contenders do not share.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    n, h, v = shape.tokens, shape.hidden, shape.vocabulary
    # In place: the memory benchmark wants no copy of the head before its baseline.
    weight = randn(v, h).mul_(LOGIT_SCALE / math.sqrt(h))
    targets = torch.randint(0, v, (n,), generator=generator, device=device)
    boost = LARGEST_BOOST * torch.rand((n, 1), generator=generator, device=device, dtype=dtype)
    student = randn(n, h) + boost * torch.nn.functional.normalize(weight[targets], dim=1)
    teacher = student + TEACHER_DISTANCE * randn(n, h)
    return Problem(student.requires_grad_(), teacher, weight.requires_grad_(), targets, objective)
