"""The command lines, on problems that take no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import compare, environment, memory_flat, peers
from benchmarks.checks import TOLERANCE
from benchmarks.cost import GPUS
from benchmarks.memory import MEBIBYTE
from benchmarks.problems import Shape
from benchmarks.roofline import predict
from selfdistill_kernels.backends import registry
from selfdistill_kernels.backends.dispatch import Found
from selfdistill_kernels.backends.native.plan import copied_bytes

ROOT = Path(__file__).resolve().parents[2]


def small_run(tmp_path, *more):
    compare.main(
        [
            "--shapes", "24/16/257", "--dtypes", "float32", "--contenders", "ours", "trl_frozen",
            "--rounds", "2", "--threads", str(torch.get_num_threads()), "--no-memory",
            "--output", str(tmp_path), *more,
        ]
    )  # fmt: skip
    return json.loads((tmp_path / "results.json").read_text())


def test_compare_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "OVERHEAD_CALLS", 2)
    monkeypatch.setattr(compare, "OVERHEAD_ROUNDS", 2)
    record = small_run(tmp_path, "--workspaces", "1", "--overhead")
    (problem,) = record["problems"]
    entries = {entry["key"]: entry for entry in problem["entries"]}
    assert list(entries) == ["floor", "ours", "floor_frozen", "trl_frozen"]
    assert all(len(entry["timing"]["seconds"]) == 2 for entry in entries.values())
    assert entries["floor"]["over_floor"] == 1.0
    assert "tiles of 24 tokens" in entries["ours"]["plan"]
    assert entries["trl_frozen"]["plan"] is None
    assert entries["ours"]["errors"]["weight"] <= TOLERANCE[torch.float32]
    assert [point["workspace"] for point in record["workspaces"]] == [MEBIBYTE, "auto"]
    assert record["overhead"][0]["shape"] == "8/64/512"
    assert record["environment"]["threads"] == torch.get_num_threads()
    printed = capsys.readouterr().out
    assert "selfdistill" in printed
    assert "results.json" in printed


def test_memory_is_measured_for_all_but_floors(tmp_path, monkeypatch):
    asked = []

    def peak(key, shape, dtype, **options):
        asked.append((key, str(shape), dtype, options["workspace"]))
        return 3 * MEBIBYTE

    monkeypatch.setattr(compare, "peak_extra_bytes", peak)
    compare.main(
        ["--shapes", "24/16/257", "--dtypes", "bfloat16", "--contenders", "ours", "--rounds", "1",
         "--workspace", "2", "--workspaces", "--output", str(tmp_path)]
    )  # fmt: skip
    record = json.loads((tmp_path / "results.json").read_text())
    assert asked == [("ours", "24/16/257", "bfloat16", 2 * MEBIBYTE)]
    assert record["problems"][0]["entries"][1]["peak_extra_bytes"] == 3 * MEBIBYTE
    assert record["workspaces"] == []


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compare.main(["--device", "cuda", "--output", str(tmp_path / "none")])
    assert capsys.readouterr().out == "No GPU that torch can use: nothing was measured.\n"
    assert not (tmp_path / "none").exists()


# Workers of pytest-xdist hand themselves down in the environment.
OF_ITS_OWN = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}


@pytest.mark.slow
def test_pytest_on_a_machine_without_a_gpu_says_so_and_passes():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "-m", "gpu", "--benchmark-only", "-q"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=OF_ITS_OWN | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stdout
    assert "No GPU that torch can use: nothing was measured." in run.stdout
    assert "passed" not in run.stdout


def test_two_objectives_with_problems_in_turn(tmp_path):
    record = small_run(
        tmp_path, "--objectives", "jsd", "cross_entropy", "--sets", "2", "--workspaces"
    )
    assert [problem["objective"] for problem in record["problems"]] == ["jsd", "cross_entropy"]
    keys = [[entry["key"] for entry in problem["entries"]] for problem in record["problems"]]
    assert keys == [["floor", "ours", "floor_frozen", "trl_frozen"], ["floor", "ours"]]
    assert record["settings"]["sets"] == 2


def test_a_library_that_fails_is_left_out_and_named(tmp_path, monkeypatch, capsys):
    def broken(problem, **options):
        raise NotImplementedError("not for this GPU\nby far")

    monkeypatch.setattr(peers, "trl", broken)
    record = small_run(tmp_path, "--workspaces")
    (problem,) = record["problems"]
    assert [entry["key"] for entry in problem["entries"]] == ["floor", "ours", "floor_frozen"]
    assert problem["failures"] == {"trl_frozen": "NotImplementedError: not for this GPU"}
    assert "without trl_frozen, reverse_kl, float32: NotImplementedError" in capsys.readouterr().out
    monkeypatch.setattr(peers, "ours", broken)
    with pytest.raises(NotImplementedError):
        small_run(tmp_path, "--workspaces")


def test_the_record_of_a_gpu_holds_what_its_times_depend_on(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(registry, "_FOUND", Found(None, None, "no nvcc"))
    facts = environment.gpu_facts()
    assert facts["compute_capability"] == "9.0"
    assert (facts["processors"], facts["gpu_memory_gib"]) == (132, 80.0)
    assert (facts["backend triton"], facts["backend native"]) == ("available", "no nvcc")
    assert set(environment.GPU_PACKAGES) <= set(facts)


def test_a_gpu_run_from_end_to_end(tmp_path, monkeypatch):
    """On CPU tensors: what differs on a GPU is its name, its clock and its allocator."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(environment, "gpu_facts", lambda: {"compute_capability": "9.0"})
    monkeypatch.setattr(compare, "clock_for", lambda device: lambda step: step() and 0.5)
    real_problem, real_check = compare.make_problem, compare.check
    real_contenders = compare.contenders

    def without_quack(*arguments, **options):
        known = real_contenders(*arguments, **options)
        if "quack" in known:
            known["quack"] = replace(known["quack"], requires="no_such_module")
        return known

    monkeypatch.setattr(compare, "contenders", without_quack)

    def on_cpu(function):
        return lambda *arguments, device, **options: function(*arguments, device="cpu", **options)

    monkeypatch.setattr(compare, "make_problem", on_cpu(real_problem))
    monkeypatch.setattr(compare, "check", on_cpu(real_check))
    monkeypatch.setattr(compare, "peak_extra_bytes", lambda *arguments, **options: 2 * MEBIBYTE)
    compare.main(
        ["--device", "cuda", "--shapes", "24/16/264", "--rounds", "2", "--contenders", "ours",
         "trl", "quack", "--output", str(tmp_path)]
    )  # fmt: skip
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["environment"]["device"] == "NVIDIA H100 80GB HBM3"
    assert record["environment"]["compute_capability"] == "9.0"
    assert record["settings"]["sets"] == 3
    divergence, entropy = record["problems"]
    assert (divergence["dtype"], entropy["objective"]) == ("bfloat16", "cross_entropy")
    predicted = {entry["key"]: entry["predicted"] for entry in divergence["entries"]}
    assert set(predicted) == {"floor", "ours", "trl"}
    assert predicted["ours"] == predict(
        "ours", Shape(24, 16, 264), "reverse_kl", "bfloat16", GPUS["H100"]
    )
    (reason,) = entropy["failures"].values()
    assert reason == "no_such_module is not installed: pip install 'quack-kernels'"
    assert divergence["entries"][1]["peak_extra_bytes"] == 2 * MEBIBYTE
    assert "predicted" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "512/576"], "expected N/H/V"),
        (["--rounds", "0"], "expected a positive integer, got '0'"),
        (["--workspace", "big"], "expected a positive integer, got 'big'"),
        (["--contenders", "nobody"], "invalid choice"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        compare.main(arguments)
    assert message in capsys.readouterr().err


def test_memory_flat(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory_flat, "peak_extra_bytes", lambda *args, **options: 5 * MEBIBYTE)
    memory_flat.main(
        ["--tokens", "64", "640", "--hidden", "8", "--vocabulary", "8192", "--dtypes", "float32",
         "--contenders", "ours", "torch", "--workspace", "8", "--output", str(tmp_path)]
    )  # fmt: skip
    record = json.loads((tmp_path / "memory_flat.json").read_text())
    assert [peak["shape"] for peak in record["peaks"]] == ["64/8/8192", "640/8/8192"] * 2
    row = 2 * 4 * 8192 + copied_bytes(8, 2)
    assert [peak["workspace_bytes"] for peak in record["peaks"]] == [
        64 * row,
        127 * row,  # as many as 8 MiB hold
        None,
        None,
    ]
    table = (tmp_path / "memory_flat.md").read_text()
    assert "| ours | float32 | 64/8/8192 | 5.0 | 4.0 | 1.0 |" in table
    assert "| torch | float32 | 640/8/8192 | 5.0 |  |  |" in table


@pytest.mark.slow
def test_pytest_collects_the_suite_when_asked_for_it():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "benchmarks/bench_loss.py::test_loss[cpu-bfloat16-ours]" in run.stdout, run.stderr
