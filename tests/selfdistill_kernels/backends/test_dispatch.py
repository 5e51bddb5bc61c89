"""Choice of backend: what "auto" takes, errors, and life without the compiled extension."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from selfdistill_kernels import fused_linear_distillation
from selfdistill_kernels.backends import registry
from selfdistill_kernels.backends.dispatch import Choice, Found, decide, served_by
from selfdistill_kernels.backends.registry import choose_backend, found

CPU = torch.device("cpu")
ALL = Found(triton_problem=None, native_problem=None, cuda_problem=None)
NO_TRITON = Found("install triton", None, None)
NO_ROWS = Found("install triton", None, "install nvcc")
NOTHING = Found("install triton", "install a compiler", "install a compiler")


@pytest.mark.parametrize(
    ("device", "dtype", "here", "expected"),
    [
        ("cuda", torch.bfloat16, ALL, "triton"),
        ("cuda", torch.float16, ALL, "triton"),
        ("cuda", torch.float32, ALL, "triton"),
        ("cuda", torch.bfloat16, NO_TRITON, "native"),
        ("cuda", torch.float16, NO_TRITON, "native"),
        ("cuda", torch.float32, NO_TRITON, "native"),
        ("cuda", torch.bfloat16, NO_ROWS, "reference"),
        ("cuda", torch.bfloat16, NOTHING, "reference"),
        ("cuda", torch.float64, ALL, "reference"),
        ("cpu", torch.float32, ALL, "native"),
        ("cpu", torch.bfloat16, NO_ROWS, "native"),
        ("cpu", torch.float16, ALL, "reference"),
        ("cpu", torch.float64, ALL, "reference"),
        ("cpu", torch.float32, NOTHING, "reference"),
        ("mps", torch.float32, ALL, "reference"),
    ],
)
def test_auto_takes_the_best_that_is_there(device, dtype, here, expected):
    assert decide("auto", device=device, dtype=dtype, found=here).backend == expected


def test_auto_says_what_it_passed_over():
    choice = decide("auto", device="cuda", dtype=torch.bfloat16, found=NO_TRITON)
    assert choice == Choice("native", (("triton", "install triton"),))
    choice = decide("auto", device="cuda", dtype=torch.bfloat16, found=NO_ROWS)
    assert choice == Choice("reference", (("triton", "install triton"), ("native", "install nvcc")))
    # Nothing is missing where no other backend takes the dtype.
    assert decide("auto", device="cpu", dtype=torch.float64, found=NOTHING) == Choice("reference")


def test_shards_of_the_vocabulary_are_for_backends_that_join_them():
    options = {"device": "cuda", "dtype": torch.bfloat16, "is_sharded": True}
    assert decide("auto", **options, found=ALL) == Choice("native")
    assert decide("auto", **options, found=NO_ROWS).backend == "reference"
    with pytest.raises(ValueError, match="'triton' takes no heads that are sharded"):
        decide("triton", **options, found=ALL)


def test_a_gpu_too_old_for_triton_is_known_before_it_runs():
    old, new = (replace(ALL, capability=capability) for capability in ((7, 5), (8, 0)))
    assert decide("auto", device="cuda", dtype=torch.float16, found=new) == Choice("triton")
    choice = decide("auto", device="cuda", dtype=torch.float16, found=old)
    assert choice.backend == "native"
    ((name, reason),) = choice.passed_over
    assert name == "triton"
    assert reason.startswith("it needs compute capability 8.0 or later, this GPU has 7.5")
    with pytest.raises(RuntimeError, match=r"capability 8\.0 or later, this GPU has 7\.5"):
        decide("triton", device="cuda", dtype=torch.float16, found=old)


def test_an_amd_gpu_without_tiles_is_known_before_it_runs():
    for amd in ("gfx942", "gfx950"):
        found = replace(ALL, amd=amd)
        assert decide("auto", device="cuda", dtype=torch.float16, found=found) == Choice("triton")
    other = replace(ALL, amd="gfx1100")
    ((name, reason),) = decide("auto", device="cuda", dtype=torch.float16, found=other).passed_over
    assert name == "triton"
    assert reason.startswith("it is for gfx942 and gfx950 among AMD's GPUs, this one is gfx1100")
    with pytest.raises(RuntimeError, match="this one is gfx1100; use backend='auto'"):
        decide("triton", device="cuda", dtype=torch.float16, found=other)


def test_an_amd_gpus_machine_is_its_own(monkeypatch):
    pytest.importorskip("triton", reason="pip install 'triton>=3.5,<3.10'")
    from selfdistill_kernels.backends.triton.plan import Machine, _machine

    names = {0: "gfx942:sramecc+:xnack-", 1: "gfx950:sramecc+:xnack-", 2: "gfx90a:xnack-"}
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(
            multi_processor_count=304, gcnArchName=names[device.index], major=9, minor=4
        ),
    )
    _machine.cache_clear()
    try:
        assert Machine.of(torch.device("cuda", 0)).architecture == "gfx942"
        assert Machine.of(torch.device("cuda", 1)).architecture == "gfx950"
        with pytest.raises(RuntimeError, match="this one is gfx90a"):
            Machine.of(torch.device("cuda", 2))
    finally:
        _machine.cache_clear()
    assert registry.found_on(torch.device("cuda", 2)) == replace(found(), amd="gfx90a")


def test_the_capability_is_that_of_the_inputs_gpu(monkeypatch):
    asked = []

    def properties(device):
        asked.append(device)
        return SimpleNamespace(major=7, minor=0)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    device = torch.device("cuda", 3)
    assert registry.found_on(device) == replace(found(), capability=(7, 0))
    assert asked == [device]
    assert registry.found_on(CPU) is found()


def test_the_interpreter_runs_triton_on_a_cpu_when_asked_for_it():
    under = Found(None, None, "install nvcc", interprets=True)
    assert decide("triton", device="cpu", dtype=torch.float16, found=under).backend == "triton"
    assert decide("auto", device="cpu", dtype=torch.float32, found=under).backend == "native"
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        decide("triton", device="cpu", dtype=torch.float32, found=ALL)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "here", "error", "message"),
    [
        ("nobody", "cpu", torch.float32, ALL, ValueError, "unknown name 'nobody'.*auto, triton"),
        ("native", "cpu", torch.float16, ALL, ValueError, "got torch.float16 on 'cpu'"),
        (
            "native",
            "mps",
            torch.float32,
            ALL,
            ValueError,
            "takes float32, bfloat16, float16 on 'cuda'",
        ),
        ("triton", "cuda", torch.float64, ALL, ValueError, "use backend='auto' or 'reference'"),
        ("native", "cpu", torch.float32, NOTHING, RuntimeError, "install a compiler"),
        ("native", "cuda", torch.float32, NO_ROWS, RuntimeError, "install nvcc"),
        ("triton", "cuda", torch.float32, NO_ROWS, RuntimeError, "install triton"),
    ],
)
def test_a_named_backend_that_cannot_serve_is_refused(name, device, dtype, here, error, message):
    with pytest.raises(error, match=message):
        decide(name, device=device, dtype=dtype, found=here)


def test_the_reference_serves_everything():
    for device in ("cpu", "cuda", "mps"):
        assert decide("reference", device=device, dtype=torch.float64, found=NOTHING) == Choice(
            "reference"
        )


def test_served_by_reads_like_a_sentence():
    assert served_by("native") == (
        "float32, bfloat16, float16 on 'cuda' and float32, bfloat16 on 'cpu'"
    )


def test_what_is_found_of_triton(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "built for CPUs only" in registry._triton_problem(has_triton=True)
    assert "pip install 'triton>=3.5,<3.10'" in registry._triton_problem(has_triton=False)
    for kind in ("cuda", "hip"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.version, kind, "7.0")
            assert registry._triton_problem(has_triton=True) is None


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_interpreter_is_found_by_its_variable(value, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert registry._find().interprets == (value == "1")


def test_auto_is_read_as_a_constant_by_the_compiler():
    hidden, weight = torch.randn(4, 8), torch.randn(31, 8)

    @torch.compile(fullgraph=True, backend="eager")
    def loss(hidden, weight):
        return fused_linear_distillation(hidden, hidden + 1, weight, backend="auto").loss

    expected = fused_linear_distillation(hidden, hidden + 1, weight, backend="native").loss
    assert torch.equal(loss(hidden, weight), expected)


def test_what_is_found_of_the_cuda_rows(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CPUs only" in registry._load_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "selfdistill_kernels._cuda", None)
    assert "install the CUDA toolkit 13.0 (nvcc on PATH or CUDA_HOME)" in registry._load_cuda()


def test_triton_is_not_imported_before_it_runs():
    code = "import sys, selfdistill_kernels; assert 'triton' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_this_process():
    assert found().native_problem is None
    assert choose_backend("auto", device=CPU, dtype=torch.bfloat16) == "native"
    meta = torch.device("meta")
    assert choose_backend("auto", device=meta, dtype=torch.float32) == "reference"


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["selfdistill_kernels._C"] = None  # as on a machine where it could not be built
import torch
from selfdistill_kernels import fused_linear_distillation

hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        fused_linear_distillation(hidden, hidden.detach() + 1, weight).loss.backward()
messages = [str(w.message) for w in caught]
assert len(messages) == 1, messages
assert "reference backend" in messages[0] and "compiler" in messages[0], messages
assert hidden.grad.any()
try:
    fused_linear_distillation(hidden, hidden.detach(), weight, backend="native")
except RuntimeError as error:
    assert "not available" in str(error)
else:
    raise AssertionError("native was asked for and is not there")
"""


def test_without_the_extension_the_reference_works_and_says_so_once():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
