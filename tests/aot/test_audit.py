"""A subset of the audit, and that its judgement bites."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import triton
import triton.language as tl
from slow import slow_but

from selfdistill_kernels import Objective
from selfdistill_kernels.backends.triton.launch import Warps
from selfdistill_kernels.tools.audit.__main__ import main
from selfdistill_kernels.tools.audit.build import Report, build
from selfdistill_kernels.tools.audit.judgement import (
    LIMITS,
    refusals,
    resident_programs,
    resident_warps,
)
from selfdistill_kernels.tools.audit.record import MACHINES, Job, Variant, jobs, variants

PLAIN = Variant(Objective("forward_kl"))
CLIPPED = Variant(Objective("forward_kl", entry_clip=0.05))
HEAVY = Variant(
    Objective("reverse_kl", policy_gradient=1.0, entropy=0.1),
    extras=True, two_heads=True, capped=True,
)  # fmt: skip
GOOD = Report(
    registers=200, spilled=0, shared=64 * 1024, tensor_memory=0, warps=8,
    tensor={"HGMMA": 8}, asynchronous={"UTMALDG": 9}, code_bytes=50_000, seconds=1.0,
)  # fmt: skip


@pytest.mark.parametrize("architecture", slow_but(["sm_90"], LIMITS))
@pytest.mark.parametrize("kernel", ["sweep", "gradient", "product"])
def test_kernels_of_the_default_objective_pass(architecture, kernel):
    found = [j for j in jobs(architecture, "bf16", [4096], [PLAIN]) if j.name == kernel]
    assert found
    for job in found[:1]:
        assert refusals(kernel, build(job, architecture), architecture) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", LIMITS)
@pytest.mark.parametrize("kernel", ["mixture", "gradient", "row_statistics", "row_gradient"])
def test_kernels_that_clip_entries_pass(architecture, kernel):
    found = [j for j in jobs(architecture, "bf16", [4096], [CLIPPED]) if j.name == kernel]
    assert found
    for job in found[:1]:
        assert refusals(kernel, build(job, architecture), architecture) == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_heaviest_sweep_passes(architecture):
    (job,) = [j for j in jobs(architecture, "fp16", [2048], [HEAVY]) if j.name == "sweep"]
    assert refusals("sweep", build(job, architecture), architecture) == []


@pytest.mark.slow
def test_a_bound_on_registers_keeps_the_assembler_from_spilling():
    found = [j for j in jobs("sm_120", "bf16", [2048], [HEAVY]) if j.name == "gradient"]
    assert found
    for job in found:
        assert refusals("gradient", build(job, "sm_120"), "sm_120") == []


@pytest.mark.parametrize("kernel", ["merge", "row_statistics", "row_gradient", "gather"])
def test_kernels_without_a_gemm_compile(kernel):
    job = next(j for j in jobs("sm_90", "bf16", [4096], [PLAIN]) if j.name == kernel)
    assert refusals(kernel, build(job, "sm_90"), "sm_90") == []


def test_hidden_sizes_share_their_code():
    one = {job.key for job in jobs("sm_90", "bf16", [4096], [PLAIN])}
    all_sizes = {job.key for job in jobs("sm_90", "bf16", chosen=[PLAIN])}
    assert {k for k in all_sizes if k[0] != "gather"} == {k for k in one if k[0] != "gather"}


def test_every_kernel_and_machine_is_recorded():
    names = {job.name for job in jobs("sm_90", "bf16", [4096], variants())}
    assert names == {
        "sweep", "mixture", "gradient", "product", "merge", "merge_mixture", "gather",
        "row_statistics", "row_gradient",
    }  # fmt: skip
    assert set(MACHINES) == set(LIMITS)


def test_descriptors_are_used_where_the_machine_has_them():
    for architecture, machine in MACHINES.items():
        job = next(j for j in jobs(architecture, "bf16", [4096], [PLAIN]) if j.name == "sweep")
        kinds = dict(job.signature)
        assert kinds["head"].startswith("tensordesc") == machine.descriptors


@triton.jit
def spilling_kernel(source, to, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(source + offsets)
    tl.debug_barrier()
    other = tl.load(source + BLOCK + offsets)
    tl.store(to + offsets, tl.sum(value * other, 0) * value + other)


def test_a_kernel_that_spills_is_refused():
    signature = (("source", "*fp32"), ("to", "*fp32"), ("BLOCK", "constexpr"))
    job = Job(spilling_kernel, signature, (("BLOCK", 32768),), ("source", "to"), (), Warps(4))
    report = build(job, "sm_90")
    assert report.spilled > 0
    assert any("spills" in reason for reason in refusals("spilling", report, "sm_90"))


def test_what_is_refused():
    assert refusals("sweep", GOOD, "sm_90") == []
    assert "shared memory" in refusals("sweep", replace(GOOD, shared=228 * 1024), "sm_90")[0]
    assert refusals("sweep", replace(GOOD, tensor={"HMMA": 8}), "sm_90") == ["no HGMMA"]
    assert refusals("sweep", replace(GOOD, asynchronous={}), "sm_90") == ["no UTMALDG"]
    assert refusals("merge", replace(GOOD, tensor={}, asynchronous={}), "sm_90") == []


def test_what_is_refused_on_amd():
    """A wave more than 256 registers leaves one on each SIMD, though nothing goes to memory."""
    good = replace(GOOD, registers=244, shared=24 * 1024, warps=4, tensor={"v_mfma": 48})
    assert refusals("sweep", good, "gfx942") == []
    assert resident_warps(good, "gfx942") == 8
    crowded = replace(good, registers=274, accumulators=18)
    assert refusals("sweep", crowded, "gfx942") == ["only 4 warps fit a multiprocessor"]
    assert refusals("merge", crowded, "gfx942") == []
    assert refusals("sweep", replace(good, scalars_spilled=256), "gfx942") == []
    scalars = refusals("sweep", replace(good, scalars_spilled=257), "gfx942")
    assert scalars == ["spills 257 scalars"]
    wide = replace(good, shared=100 * 1024, warps=8)
    assert "shared memory" in refusals("sweep", wide, "gfx942")[0]
    assert refusals("sweep", wide, "gfx950") == []


def test_resident_programs():
    assert resident_programs(GOOD, "sm_90") == 1  # 256 threads of 200 registers
    assert resident_programs(replace(GOOD, registers=128), "sm_90") == 2
    assert resident_programs(replace(GOOD, registers=32), "sm_90") == 3  # shared memory
    assert resident_programs(replace(GOOD, registers=32, tensor_memory=256), "sm_100") == 2


def test_exit_status(monkeypatch, tmp_path, capsys):
    from selfdistill_kernels.tools.audit import __main__ as program

    monkeypatch.setattr(program, "jobs", lambda *_: jobs("sm_90", "bf16", [4096], [PLAIN])[:1])
    command = ["--target", "sm_90", "--dtype", "bf16", "--json", str(tmp_path / "audit.json")]
    monkeypatch.setattr(program, "build", lambda *_: GOOD)
    assert main(command) == 0
    monkeypatch.setattr(program, "build", lambda *_: replace(GOOD, spilled=8))
    assert main(command) == 1
    assert "spills 8" in capsys.readouterr().out
    assert '"spilled": 8' in (tmp_path / "audit.json").read_text()


COMMON = {"target": "sm_90", "dtype": "bf16", "kernel": "sweep", "tile": "64x64x64"}


def test_summary_sums_up_variants(tmp_path, capsys):
    from selfdistill_kernels.tools.audit.summary import main as summary

    def entry(**changes):
        report = replace(GOOD, **changes.pop("report", {}))
        found = {"far": [], "resident": 1, "resident_warps": 8, "refusals": []}
        return {**COMMON, **found, **asdict(report), **changes}

    first = [entry(report={"registers": 90, "seconds": 1.0}), entry(report={"registers": 130})]
    second = [
        entry(tile="128x64x64", report={"spilled": 8, "seconds": 2.0}, refusals=["spills 8"]),
        {**COMMON, "far": ["head"], "refusals": ["does not compile: why"]},
        entry(kernel="gather", report={"tensor": {}, "asynchronous": {}}),
    ]
    files = []
    for name, entries in (("a", first), ("b", second)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"triton": "3.9.0", "entries": entries}))
    joined = tmp_path / "all.json"
    summary([*map(str, files), "--join", str(joined)])
    out = capsys.readouterr().out
    assert "5 kernels compiled, 2 refused" in out
    (sweep,) = [line for line in out.splitlines() if "| sweep |" in line]
    cells = [cell.strip() for cell in sweep.strip("|").split("|")]
    assert cells[3:9] == ["4", "1", "64x64x64, 128x64x64", "90-200", "0", "8"]
    assert cells[-1] == "2"
    assert json.loads(joined.read_text())["entries"] == [*first, *second]

    files[1].write_text(json.dumps({"triton": "3.8.0", "entries": second}))
    with pytest.raises(SystemExit):
        summary(list(map(str, files)))
