"""The command lines, on problems that take no time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import compare, memory_flat
from benchmarks.memory import MEBIBYTE

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
    assert entries["ours"]["errors"]["weight"] < 2e-5
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
        ["--tokens", "64", "128", "--hidden", "8", "--vocabulary", "8192", "--dtypes", "float32",
         "--contenders", "ours", "torch", "--workspace", "4", "--output", str(tmp_path)]
    )  # fmt: skip
    record = json.loads((tmp_path / "memory_flat.json").read_text())
    assert [peak["shape"] for peak in record["peaks"]] == ["64/8/8192", "128/8/8192"] * 2
    assert [peak["workspace_bytes"] for peak in record["peaks"]] == [4 * MEBIBYTE] * 2 + [None] * 2
    table = (tmp_path / "memory_flat.md").read_text()
    assert "| ours | float32 | 64/8/8192 | 5.0 | 4.0 | 1.0 |" in table
    assert "| torch | float32 | 128/8/8192 | 5.0 |  |  |" in table


def test_pytest_collects_the_suite_when_asked_for_it():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "benchmarks/bench_loss.py::test_loss[ours-bfloat16]" in run.stdout, run.stderr
