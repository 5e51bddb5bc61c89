"""What is there, what is missing, what would run: python -m selfdistill_kernels.tools.doctor.

Findings are gathered once (`examine`) and everything printed is made from them. With --gpu, each
backend that a GPU can use is first compared with float64 on the CPU and then timed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata

import torch
from torch import Tensor

from selfdistill_kernels import backends
from selfdistill_kernels.backends.dispatch import SERVED, Found, decide
from selfdistill_kernels.backends.native.gemm import widens
from selfdistill_kernels.backends.native.plan import TilePlan
from selfdistill_kernels.backends.native.product_form import Comparison, compare
from selfdistill_kernels.loss import fused_linear_distillation
from selfdistill_kernels.tools.event_clock import EventClock

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Packages beside torch: what they are for, and the command that installs one that is missing.
PACKAGES = {
    "triton": ("fused kernels on a GPU", "pip install 'triton>=3.5,<3.10'"),
    "transformers": ("the trainer", "pip install transformers"),
    "flash-attn": ("optional", "pip install --no-build-isolation 'flash-attn>=2.4.1'"),
    "vllm": ("optional", "pip install vllm"),
    "peft": ("optional", "pip install peft"),
}
NO_GPU = "No GPU that torch can use: nothing was checked or timed."
# Largest error allowed, relative to the largest value; gradients come back in the inputs' dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
ROUNDS = 7
TYPICAL_SHAPE = (256, 1024, 16384)  # tokens, hidden size, vocabulary
GIBIBYTE = float(1 << 30)

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Findings:
    """What this machine has.

    Attributes:
        versions: of torch and PACKAGES; None where a package is not installed.
        cuda: what torch was built for, such as "CUDA 13.0", "ROCm 7.0", or None for a CPU build.
        gpus: the names of the GPUs that torch can use.
        threads: of torch.
        instructions: vector instructions of the row kernels, None without the extension.
        has_bfloat16_products: whether bfloat16 GEMMs run natively on the CPU.
        logits_form: which form of the float32 logits product is taken on the CPU and why, for
            TYPICAL_SHAPE; None without the extension.
        found: what the choice of a backend is made of.
    """

    versions: dict[str, str | None]
    cuda: str | None
    gpus: tuple[str, ...]
    threads: int
    instructions: str | None
    has_bfloat16_products: bool
    logits_form: str | None
    found: Found


@dataclass(frozen=True)
class Question:
    """The problem that somebody wants to run.

    Attributes:
        tokens, hidden, vocabulary: N, H, V; student and teacher share the head.
        dtype: a key of DTYPES.
        device: type of device, "cpu" or "cuda".
        frozen: whether the head gets no gradient.
    """

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str
    device: str
    frozen: bool = False


# What a backend is checked on: no size is a multiple of a tile.
CHECK = Question(tokens=70, hidden=96, vocabulary=1021, dtype="float64", device="cpu")


def examine() -> Findings:
    """Look at this process and machine."""
    built_for = None
    if torch.version.cuda is not None:
        built_for = f"CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        built_for = f"ROCm {torch.version.hip}"
    native = backends.native_problem() is None
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Findings(
        versions={name: _version(name) for name in ("torch", *PACKAGES)},
        cuda=built_for,
        gpus=gpus,
        threads=torch.get_num_threads(),
        instructions=torch.ops.selfdistill.cpu_capability() if native else None,
        has_bfloat16_products=native and bool(torch.ops.selfdistill.gemm_bf16_available()),
        logits_form=_compare_forms().describe() if native else None,
        found=backends.found_on(torch.device("cuda", 0)) if gpus else backends.found(),
    )


def _compare_forms() -> Comparison:
    """Of the float32 logits product; below a second."""
    tokens, hidden, vocabulary = TYPICAL_SHAPE
    weight = torch.randn(vocabulary, hidden)
    return compare(torch.randn(tokens, hidden), weight, torch.empty(tokens, vocabulary))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def report(findings: Findings, question: Question) -> str:
    """Everything that is known, and what would run for the question."""
    sections = {
        "Versions": _versions(findings),
        "Devices": _devices(findings),
        "Backends": _backends(findings),
        f"What would run for {_shape(question)}": what_runs(findings, question),
    }
    lines = []
    for title, body in sections.items():
        lines += [title, *(f"  {line}" for line in body), ""]
    return "\n".join(lines[:-1])


def _versions(findings: Findings) -> Iterator[str]:
    width = max(map(len, findings.versions))
    for name, version in findings.versions.items():
        if version is None:
            purpose, command = PACKAGES[name]
            version = f"not installed ({purpose}): {command}"
        elif name == "torch":
            version += f", built for {findings.cuda or 'CPUs only'}"
        yield f"{name:{width}}  {version}"


def _devices(findings: Findings) -> Iterator[str]:
    instructions = findings.instructions or "unknown without the compiled extension"
    products = "native" if findings.has_bfloat16_products else "widened to float32"
    yield f"CPU   {findings.threads} threads, row kernels: {instructions}, bfloat16: {products}"
    if findings.logits_form is not None:
        yield f"      float32 logits: {findings.logits_form}"
    for index, name in enumerate(findings.gpus):
        yield f"GPU {index} {name}"
    if not findings.gpus:
        yield "GPU   none that torch can use"


def _backends(findings: Findings) -> Iterator[str]:
    for backend, device in SERVED:
        if (backend, device) == ("triton", "cpu") and not findings.found.interprets:
            continue
        missing = findings.found.missing(backend, device)
        unwanted = findings.found.unwanted(backend, device)
        label = f"{backend} on {device}"
        if missing is None and unwanted is not None:
            yield f"{label:15}  ready, but not for backend='auto': {unwanted}"
        else:
            yield f"{label:15}  {'ready' if missing is None else f'missing: {missing}'}"
    yield f"{'reference':15}  ready (materialises [tokens, vocabulary])"


def what_runs(findings: Findings, question: Question) -> Iterator[str]:
    """The backend that "auto" takes, how it walks the problem, and what a better one would need."""
    dtype = DTYPES[question.dtype]
    choice = decide("auto", device=question.device, dtype=dtype, found=findings.found)
    yield f"backend {choice.backend}"
    if question.device == "cuda" and not findings.gpus:
        yield "on a machine with a GPU: this one has none that torch can use"
    if choice.backend == "native":
        plan = TilePlan.choose(
            tokens=question.tokens,
            hidden=question.hidden,
            vocabulary=question.vocabulary,
            models=2,
            itemsize=dtype.itemsize,
            need_weight=not question.frozen,
            on_gpu=question.device == "cuda",
            widened_hidden=question.hidden if widens(dtype, question.device) else 0,
        )
        yield plan.describe()
    elif choice.backend == "triton":
        yield "fused sweep, or tiles of logits where every token carries a gradient"
    else:
        # Raw scores, logits and log-probs of both models, at the least.
        itemsize = 8 if question.device == "cpu" else 4
        needed = 6 * itemsize * question.tokens * question.vocabulary
        yield f"at least {needed / GIBIBYTE:.2f} GiB for [tokens, vocabulary]"
    for backend, missing in choice.passed_over:
        yield f"instead of {backend}: {missing}"


def _shape(question: Question) -> str:
    frozen = ", frozen head" if question.frozen else ""
    return (
        f"{question.tokens} tokens, hidden {question.hidden}, vocabulary {question.vocabulary}, "
        f"{question.dtype} on {question.device}{frozen}"
    )


# ---- --gpu ---------------------------------------------------------------------------------------


def check_and_time(
    findings: Findings, question: Question, *, clock: Clock, print_line: Callable[[str], None]
) -> bool:
    """Compare each backend of the question's device with float64, then time those that pass.

    Args:
        clock: seconds of one call.
        print_line: takes each line as soon as it is known.

    Returns:
        True when no backend gave a wrong result.
    """
    right = True
    for backend, device in SERVED:
        if device != question.device:
            continue
        missing = findings.found.missing(backend, device)
        if missing is not None:
            print_line(f"{backend}: missing: {missing}")
            continue
        passed = True
        for dtype in SERVED[backend, device]:
            error = largest_error(backend, device, dtype)
            passed &= error <= TOLERANCE[dtype]  # False for NaN
            verdict = "right" if error <= TOLERANCE[dtype] else "WRONG"
            print_line(
                f"{backend}, {_name(dtype)}: {verdict}, error {error:.1e} of {TOLERANCE[dtype]:.0e}"
            )
        right &= passed
        if passed and DTYPES[question.dtype] in SERVED[backend, device]:
            seconds = median_seconds(backend, question, clock)
            print_line(f"{backend}, {_shape(question)}: {seconds * 1e3:.2f} ms")
    return right


def largest_error(backend: str, device: str, dtype: torch.dtype) -> float:
    """Largest error of loss, dH and dW of a small problem against the oracle in float64 on the CPU,
    each relative to its largest value."""
    errors = []
    for objective in ("forward_kl", "reverse_kl", "jsd"):
        rounded = [_on(tensor, device, dtype) for tensor in _inputs(CHECK)]
        widened = [_on(tensor, "cpu", torch.float64) for tensor in rounded]
        exact = _step(backend="reference", objective=objective, inputs=widened)
        made = _step(backend=backend, objective=objective, inputs=rounded)
        for got, want in zip(made, exact, strict=True):
            gap = (got.detach().cpu().double() - want).abs().max() / want.abs().max()
            errors.append(float(gap))
    # max() would drop a NaN.
    return float("nan") if any(error != error for error in errors) else max(errors)


def median_seconds(backend: str, question: Question, clock: Clock) -> float:
    """Forward and backward of the reverse KL at the question's shape, after two warm-up calls."""
    inputs = [_on(tensor, question.device, DTYPES[question.dtype]) for tensor in _inputs(question)]
    step = functools.partial(_step, backend=backend, inputs=inputs, frozen=question.frozen)
    return statistics.median([clock(step) for _ in range(ROUNDS + 2)][2:])


def _inputs(question: Question) -> list[Tensor]:
    """Student's and teacher's hidden states, head and targets, in float32."""
    tokens, hidden, vocabulary = question.tokens, question.hidden, question.vocabulary
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    student = randn(tokens, hidden)
    teacher = student + 0.2 * randn(tokens, hidden)
    head = randn(vocabulary, hidden) * (2.5 / hidden**0.5)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return [student, teacher, head, targets]


def _on(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def _step(
    *,
    backend: str,
    inputs: Sequence[Tensor],
    objective: str = "reverse_kl",
    frozen: bool = False,
) -> tuple[Tensor, ...]:
    """Return the loss, dH and, with a trained head, dW."""
    student, teacher, head, targets = inputs
    leaves = [student.detach().requires_grad_()]
    head = head.detach().requires_grad_(not frozen)
    if not frozen:
        leaves.append(head)
    loss = fused_linear_distillation(
        leaves[0], teacher, head, targets, objective=objective, backend=backend
    ).loss
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- the command line ----------------------------------------------------------------------------


def run(
    *,
    tokens: int,
    hidden: int,
    vocabulary: int,
    dtype: str,
    device: str | None,
    frozen: bool,
    gpu: bool,
) -> int:
    """Print the report and, with `gpu`, what a GPU gives; return the exit status.

    Args:
        tokens, hidden, vocabulary, dtype, device, frozen: see Question; without a device it is the
            GPU's where there is one.
        gpu: also check and time the GPU's backends.
    """
    findings = examine()
    on = device or ("cuda" if findings.gpus else "cpu")
    question = Question(tokens, hidden, vocabulary, dtype, on, frozen)
    print(report(findings, question))
    if not gpu:
        return 0
    print()
    if not findings.gpus:
        print(NO_GPU)
        return 0
    print(f"On {findings.gpus[0]}")

    def print_line(line: str) -> None:
        print(f"  {line}", flush=True)

    on_gpu = replace(question, device="cuda")
    right = check_and_time(findings, on_gpu, clock=EventClock(), print_line=print_line)
    return 0 if right else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 when a backend gave a wrong result."""
    parser = argparse.ArgumentParser(
        prog="python -m selfdistill_kernels.tools.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    for name, default in (("tokens", 8192), ("hidden", 4096), ("vocabulary", 128256)):
        add(f"--{name}", type=_positive, default=default, metavar=name[0].upper())
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--frozen", action="store_true", help="the head gets no gradient")
    add("--gpu", action="store_true", help="check and time the backends on the GPU")
    return run(**vars(parser.parse_args(argv)))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
