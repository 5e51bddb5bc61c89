"""Bits of a fixed grid of small problems, to see whether a change of the code changed a result.

    python -m benchmarks.fingerprint > before.txt      # and after.txt with the other revision
    diff before.txt after.txt

Prints a SHA-256 for each case, over the loss, the per-token results and the gradients. Two
revisions can be compared on one machine and with one torch: other processors and other libraries
round differently. With TRITON_INTERPRET=1 the cases are those of the Triton backend, fewer of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
)
from selfdistill_kernels.backends.registry import found

SEQUENCES, HIDDEN, VOCABULARY = 2, 24, 149
# Tokens of a sequence: enough for several tiles of the `store` strategy, or as few as the
# interpreter has time for.
TIME, SHORT_TIME = 40, 13
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Bytes of a workspace that cut a problem into slabs of the vocabulary (strategy `recompute`), and
# into several tiles of tokens (strategy `store`).
SLABS, TILES = 24_000, 60_000
# The interpreter gets one way in so many of each divergence and dtype, another one each time.
INTERPRETED = 7


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        name: as it is printed.
        function: "hidden", "logits" or "logprobs", one of the three public functions.
        dtype: a key of DTYPES.
        options: keyword arguments of that function.
        tensors: names of the optional tensors that are passed to it.
        frozen: whether the head gets no gradient.
        time: tokens of a sequence.
    """

    name: str
    function: str
    dtype: str
    options: Mapping[str, Any]
    tensors: tuple[str, ...]
    frozen: bool = False
    time: int = TIME


def cases() -> Iterator[Case]:
    """The grid: each backend, dtype and divergence with each way through the code."""
    backends = ["native", "reference"] if found().native_problem is None else ["reference"]
    if found().interprets:
        backends = ["triton"]
    for backend in backends:
        interpreted = backend == "triton"
        time = SHORT_TIME if interpreted else TIME
        for turn, (dtype, divergence) in enumerate(itertools.product(DTYPES, DIVERGENCES)):
            ways = list(_ways(divergence))
            for way in ways[turn % INTERPRETED :: INTERPRETED] if interpreted else ways:
                yield replace(
                    way,
                    name=f"{backend} {dtype} {divergence} {way.name}",
                    dtype=dtype,
                    options={**way.options, "backend": backend},
                    time=time,
                )
        for dtype in DTYPES:
            yield Case(
                f"{backend} {dtype} log-probs", "logprobs", dtype,
                {"temperature": 0.8, "softcap": 5.0, "workspace": SLABS, "backend": backend},
                ("mask", "bias"), time=time,
            )  # fmt: skip


def _ways(divergence: str) -> Iterator[Case]:
    """Calls for one divergence, without a dtype and a backend."""

    def way(
        name: str,
        function: str,
        *tensors: str,
        terms: Mapping[str, Any] | None = None,
        frozen: bool = False,
        **options: Any,
    ) -> Case:
        given = {"objective": Objective(divergence, 0.3, **(terms or {})), **options}
        return Case(name, function, "", given, tensors, frozen)

    mixed = {"policy_gradient": 0.5, "cross_entropy": 0.2, "entropy": -0.1}
    clips = {"divergence_clip": 0.4, "importance_clip": 1.1, "cross_entropy": 1.0}
    top = AdvantageMask(top_fraction=0.4)
    yield way("dense", "hidden", "targets")
    yield way("dense, no targets", "hidden", reduction="sum")
    yield way("tiles", "hidden", "targets", "mask", workspace=TILES, terms=mixed)
    yield way("tiles, frozen head", "hidden", "targets", workspace=SLABS, frozen=True)
    yield way("slabs", "hidden", "targets", workspace=SLABS, terms=mixed)
    yield way("masked", "hidden", "targets", "mask", "token_weight", reduction="sequence_mean")
    yield way("compact", "hidden", "targets", "mask", advantage_mask=AdvantageMask(0.2, "negative"))
    yield way(
        "compact, slabs", "hidden", "targets", "mask",
        advantage_mask=AdvantageMask(0.2), workspace=SLABS,
    )  # fmt: skip
    yield way(
        "two heads", "hidden", "targets", "mask", "teacher_weight", "bias", "teacher_bias",
        softcap=5.0, temperature=0.7, logit_scale=1.3,
    )  # fmt: skip
    yield way("clips", "hidden", "targets", "old_logprobs", terms=clips)
    yield way("largest advantages", "hidden", "targets", "mask", advantage_mask=top)
    yield way(
        "steps", "hidden", "targets", "step_ids",
        advantage_mask=AdvantageMask(0.05, per_step=True), reduction="none",
    )  # fmt: skip
    yield way("top-k", "hidden", "targets", "mask", terms={"top_k": 7})
    yield way(
        "top-k, no tail", "hidden", "targets", workspace=SLABS,
        terms={"top_k": 7, "top_k_of": "teacher", "tail": False, **mixed},
    )  # fmt: skip
    yield way("logits", "logits", "targets", "mask", temperature=0.9, terms=mixed)
    yield way("logits in place", "logits", "targets", "mask", in_place=True)


def tensors_of(dtype: torch.dtype, time: int) -> dict[str, Tensor]:
    """Every tensor that a case may take; the same values on every machine."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, scale: float = 1.0) -> Tensor:
        """In [-scale, scale), multiples of scale / 2^16: no library rounds anything here."""
        whole = torch.randint(-(1 << 16), 1 << 16, shape, generator=generator)
        return (whole.double() * (scale / (1 << 16))).to(dtype)

    leading = (SEQUENCES, time)
    student = numbers(*leading, HIDDEN)
    targets = torch.randint(0, VOCABULARY, leading, generator=generator)
    targets[0, -2] = -100
    mask = torch.ones(leading, dtype=torch.bool)
    mask[1, 4:8] = False
    logits = numbers(*leading, VOCABULARY, scale=3.0)
    return {
        "student_hidden": student,
        "teacher_hidden": student + numbers(*leading, HIDDEN, scale=0.5),
        "weight": numbers(VOCABULARY, HIDDEN),
        "teacher_weight": numbers(VOCABULARY, HIDDEN),
        "bias": numbers(VOCABULARY),
        "teacher_bias": numbers(VOCABULARY),
        "student_logits": logits,
        "teacher_logits": logits + numbers(*leading, VOCABULARY),
        "targets": targets,
        "mask": mask,
        "token_weight": numbers(*leading).abs(),
        "old_logprobs": numbers(*leading) - 5,
        "step_ids": torch.arange(time).div(4, rounding_mode="floor").expand(leading) - 1,
    }


def results(case: Case) -> list[Tensor | None]:
    """What one case returns, and its gradients."""
    given = tensors_of(DTYPES[case.dtype], case.time)
    optional: dict[str, Any] = {name: given[name] for name in case.tensors}
    if case.function == "logits":
        leaves = [given["student_logits"].requires_grad_()]
        # In place, autograd wants a tensor that some operation made.
        student = leaves[0].clone()
        output = distillation_from_logits(
            student, given["teacher_logits"], **optional, **case.options
        )
    else:
        student, weight = given["student_hidden"], given["weight"]
        trained = [student] if case.frozen else [student, weight]
        trained += [optional["bias"]] if "bias" in optional else []
        leaves = [tensor.requires_grad_() for tensor in trained]
        if case.function == "logprobs":
            made = fused_linear_logprobs(
                student, weight, given["targets"], **optional, **case.options
            )
            # Weights that differ from token to token, so that no gradient is left out by chance.
            each = torch.arange(made.logprobs.numel()).view_as(made.logprobs) / 8
            loss = (each * made.logprobs - made.entropy).sum()
            return [*made, *torch.autograd.grad(loss, leaves)]
        output = fused_linear_distillation(
            student, given["teacher_hidden"], weight, **optional, **case.options
        )
    loss = output.loss if output.loss.dim() == 0 else (output.loss + output.divergence).sum()
    return [
        output.loss, output.divergence, output.student_logprob, output.teacher_logprob,
        output.advantage, output.entropy, output.teacher_entropy, output.active,
        *torch.autograd.grad(loss, leaves),
    ]  # fmt: skip


def fingerprint(case: Case) -> str:
    """SHA-256 of the bytes of all results, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in results(case):
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Print a line for each case."""
    for case in cases():
        print(fingerprint(case), case.name)


if __name__ == "__main__":
    main()
