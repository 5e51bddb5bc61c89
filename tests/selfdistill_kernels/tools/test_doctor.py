"""What the doctor prints, from findings of machines that are not this one."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from selfdistill_kernels.backends.dispatch import Found
from selfdistill_kernels.backends.native.plan import TilePlan
from selfdistill_kernels.backends.triton_versions import untested
from selfdistill_kernels.tools import doctor
from selfdistill_kernels.tools.doctor import (
    NO_GPU,
    Findings,
    Question,
    check_and_time,
    report,
    what_runs,
)

VERSIONS = {
    "torch": "2.13.0",
    "triton": "3.9.0",
    "transformers": "5.23.0",
    "flash-attn": None,
    "vllm": None,
    "peft": "0.21.2",
}
H100 = Findings(
    VERSIONS, "CUDA 13.0", ("NVIDIA H100 80GB HBM3",), 32, "avx512", True,
    "plain (transposed in 1.20 of the plain time, the same bits)", Found(None, None, None),
)  # fmt: skip
LAPTOP = Findings(
    VERSIONS | {"triton": None}, None, (), 8, None, False, None,
    Found("this torch is built for CPUs only", "no compiler; run `apt install g++`", "no compiler"),
)  # fmt: skip
QUESTION = Question(8192, 4096, 128256, "bfloat16", "cuda")


def section(text: str, title: str) -> list[str]:
    """The lines below a title."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    end = next((i for i in range(start, len(lines)) if not lines[i]), len(lines))
    return [line.strip() for line in lines[start + 1 : end]]


def test_a_triton_that_was_not_tested_is_no_choice_of_auto():
    found = Found(None, None, None, untested_triton=untested("3.99.0"))
    text = report(replace(H100, found=found), QUESTION)
    (line,) = [one for one in section(text, "Backends") if one.startswith("triton on cuda")]
    assert "ready, but not for backend='auto': Triton 3.99.0 is none of those" in line
    runs = section(text, "What would run")
    assert runs[0] == "backend native"
    assert runs[-1].startswith("instead of triton: Triton 3.99.0 is none")


def test_a_gpu_machine_with_everything():
    text = report(H100, QUESTION)
    versions = section(text, "Versions")
    assert "torch         2.13.0, built for CUDA 13.0" in versions
    assert (
        "flash-attn    not installed (optional): "
        "pip install --no-build-isolation 'flash-attn>=2.4.1'"
    ) in versions
    assert section(text, "Devices") == [
        "CPU   32 threads, row kernels: avx512, bfloat16: native",
        "float32 logits: plain (transposed in 1.20 of the plain time, the same bits)",
        "GPU 0 NVIDIA H100 80GB HBM3",
    ]
    assert section(text, "Backends") == [
        "triton on cuda   ready",
        "native on cuda   ready",
        "native on cpu    ready",
        "reference        ready (materialises [tokens, vocabulary])",
    ]
    runs = section(text, "What would run for 8192 tokens, hidden 4096, vocabulary 128256, bfloat16")
    assert runs == [
        "backend triton",
        "fused sweep, or tiles of logits where every token carries a gradient",
    ]


def test_a_laptop_with_nothing_says_what_mends_it():
    text = report(LAPTOP, replace(QUESTION, device="cpu"))
    versions = section(text, "Versions")
    assert versions[0] == "torch         2.13.0, built for CPUs only"
    assert versions[1] == (
        "triton        not installed (fused kernels on a GPU): pip install 'triton>=3.5,<3.10'"
    )
    assert section(text, "Devices") == [
        "CPU   8 threads, row kernels: unknown without the compiled extension, "
        "bfloat16: widened to float32",
        "GPU   none that torch can use",
    ]
    assert "native on cpu    missing: no compiler; run `apt install g++`" in text
    assert section(text, "What would run") == [
        "backend reference",
        "at least 46.97 GiB for [tokens, vocabulary]",
        "instead of native: no compiler; run `apt install g++`",
    ]


def test_a_gpu_without_triton_runs_the_cuda_rows_and_says_why():
    found = Found("run `pip install 'triton>=3.5,<3.10'`", None, None)
    lines = list(what_runs(replace(H100, found=found), QUESTION))
    assert lines[0] == "backend native"
    assert lines[1].startswith("recompute (two sweeps over slabs")
    assert lines[2] == "instead of triton: run `pip install 'triton>=3.5,<3.10'`"


@pytest.mark.parametrize("frozen", [False, True])
def test_the_plan_is_the_one_that_the_cpu_walks(frozen):
    question = Question(512, 576, 49152, "float32", "cpu", frozen)
    plan = TilePlan.choose(
        tokens=512, hidden=576, vocabulary=49152, models=2, itemsize=4, need_weight=not frozen
    )
    assert list(what_runs(H100, question)) == ["backend native", plan.describe()]
    assert (", frozen head" in report(H100, question)) == frozen


def test_a_question_about_a_gpu_on_a_machine_without_one():
    lines = list(what_runs(replace(H100, gpus=()), QUESTION))
    assert lines[:2] == [
        "backend triton",
        "on a machine with a GPU: this one has none that torch can use",
    ]


def test_the_interpreter_is_listed_where_it_runs():
    found = replace(H100.found, interprets=True)
    assert "triton on cpu    ready" in report(replace(H100, found=found), QUESTION)
    assert "triton on cpu" not in report(H100, QUESTION)


# ---- --gpu, on the CPU's own backend -------------------------------------------------------------

SMALL = Question(64, 32, 256, "float32", "cpu")


def test_a_backend_is_checked_then_timed():
    calls, lines = [], []

    def clock(step):
        assert len(step()) == 3  # loss, dH, dW
        calls.append(step)
        return {1: 50.0, 2: 60.0}.get(len(calls), 0.002 * len(calls))

    here = replace(doctor.examine(), gpus=("NVIDIA H100 80GB HBM3",))
    assert check_and_time(here, SMALL, clock=clock, print_line=lines.append)
    assert lines[0].startswith("triton: missing: ")
    assert lines[1].startswith("native, float32: right, error ")
    assert lines[2].startswith("native, bfloat16: right, error ")
    # Two warm-up calls, then the median of the 3rd to the 9th.
    assert lines[3] == "native, 64 tokens, hidden 32, vocabulary 256, float32 on cpu: 12.00 ms"


def test_a_wrong_backend_is_named_and_not_timed(monkeypatch):
    lines = []
    real = doctor.largest_error

    def spoiled(backend, device, dtype):
        return math.nan if dtype == torch.bfloat16 else real(backend, device, dtype)

    def no_clock(step):
        raise AssertionError("a wrong backend is not timed")

    monkeypatch.setattr(doctor, "largest_error", spoiled)
    here = doctor.examine()
    assert not check_and_time(here, SMALL, clock=no_clock, print_line=lines.append)
    assert lines[-1] == "native, bfloat16: WRONG, error nan of 2e-02"


@pytest.mark.parametrize("spoil", ["loss", "hidden", "weight", "nan"])
def test_the_check_sees_every_output(spoil, monkeypatch):
    real = doctor._step

    def spoiled(*, backend, **options):
        loss, hidden, weight = real(backend=backend, **options)
        if backend != "native":
            return loss, hidden, weight
        if spoil == "nan":
            return loss * float("nan"), hidden, weight
        factors = {name: 1.01 if name == spoil else 1.0 for name in ("loss", "hidden", "weight")}
        return loss * factors["loss"], hidden * factors["hidden"], weight * factors["weight"]

    # A hundredth of the spoiled result's error is what the doctor allows in float32.
    allowed = doctor.TOLERANCE[torch.float32]
    assert doctor.largest_error("native", "cpu", torch.float32) <= allowed
    monkeypatch.setattr(doctor, "_step", spoiled)
    assert not doctor.largest_error("native", "cpu", torch.float32) <= 50 * allowed


def test_on_a_machine_without_a_gpu_it_says_so_and_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: LAPTOP)
    assert doctor.main(["--gpu", "--tokens", "16"]) == 0
    assert capsys.readouterr().out.endswith(f"\n\n{NO_GPU}\n")


@pytest.mark.parametrize(("right", "status"), [(True, 0), (False, 1)])
def test_a_wrong_result_on_a_gpu_is_an_exit_status(right, status, monkeypatch, capsys):
    def checked(findings, question, **options):
        assert question.device == "cuda"
        options["print_line"]("a line")
        return right

    monkeypatch.setattr(doctor, "examine", lambda: H100)
    monkeypatch.setattr(doctor, "check_and_time", checked)
    assert doctor.main(["--gpu", "--device", "cpu"]) == status
    assert capsys.readouterr().out.endswith("On NVIDIA H100 80GB HBM3\n  a line\n")


def test_as_a_module_without_the_trainer():
    """It imports neither the trainer nor its dependencies."""
    code = (
        "import sys\n"
        "for name in ('selfdistill', 'transformers', 'typer', 'rich'): sys.modules[name] = None\n"
        "from selfdistill_kernels.tools.doctor import main\n"
        "sys.exit(main(['--tokens', '64', '--hidden', '32', '--vocabulary', '512']))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "64 tokens, hidden 32, vocabulary 512" in run.stdout


def test_bad_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--tokens", "none"])
    assert "expected a positive integer, got 'none'" in capsys.readouterr().err
