"""What `make gpu` does around its kernels: time, processes, the record and the page.

The kernels of its sections run under Triton's interpreter, in tests/triton/test_gpu_run.py.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import checks
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import losses, training_step, workers
from benchmarks.gpu.page import page
from benchmarks.gpu.section import Section, Wrong, WrongValueError
from benchmarks.gpu.setting import SECTIONS, StandInClock, on_a_gpu, rehearsal
from benchmarks.peers import contenders
from benchmarks.problems import Shape
from benchmarks.report import Table
from benchmarks.step import ModelSize, StepProblem, StepShape

ROOT = Path(__file__).resolve().parents[2]
WRONG = Wrong(
    kernels="gradient, product", problem="gradient jsd bfloat16 16/32/64", result="d weight",
    entry=(3, 7), expected=0.25, got=-1.5, error=0.7, allowed=0.01, plain=0.002,
    repeat="python -m benchmarks.gpu --section values --problem 'gradient jsd bfloat16 16/32/64'",
)  # fmt: skip


def left_by(section: Section) -> dict:
    section.save()
    return json.loads(section.file.read_text())


@pytest.fixture
def section(tmp_path):
    return Section("values", 60.0, tmp_path / "values.json")


def test_a_wrong_value_says_what_a_person_needs():
    text = str(WrongValueError(WRONG))
    for part in ("gradient, product", "jsd bfloat16", "d weight", "[3, 7]", "expected 0.25",
                 "got -1.5", "error 0.7", "allowed 0.01", "--problem 'gradient jsd"):  # fmt: skip
        assert part in text


def test_a_section_knows_its_time_and_names_what_it_left_out(tmp_path):
    clock = iter([100.0, 107.0, 115.0, 115.0])
    section = Section("losses", 20.0, tmp_path / "losses.json", now=lambda: next(clock))
    assert section.has_time("the first", 10.0)
    assert not section.has_time("the second", 10.0)
    assert json.loads(section.file.read_text())["left_out"] == ["the second: no time"]


def test_the_stand_in_clock_runs_the_call_and_counts():
    calls = []
    clock = StandInClock()
    assert [clock(lambda: calls.append(1)) for _ in range(3)] == [0.001, 0.002, 0.003]
    assert len(calls) == 3


SHARES = [[case.name for case in workers.share_of(rehearsal(), n)] for n in range(2)]
# In place of a process that computes: `body` knows its number and the names of its problems, and
# leaves what it "found".
STAND_IN = """
import json, os, pathlib, sys, time

def after(option):
    return sys.argv[sys.argv.index(option) + 1]

number, file = int(after("--worker")), pathlib.Path(after("--file"))
names = {shares}[number]

def leave(passed, left_out=(), wrong=None):
    found = [dict([("problem", name), ("error of allowed", 0.5)]) for name in passed]
    record = dict(data=dict(passed=found), left_out=list(left_out), wrong=wrong)
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(record))
    scratch.replace(file)

{body}
"""
LEAVES_A_WRONG_VALUE = f"""
    leave(names[:1], [name + ": no time" for name in names[1:]], {vars(WRONG)})
    sys.exit(1)
"""


def check_with(section: Section, body: str) -> None:
    code = STAND_IN.format(shares=SHARES, body=body)
    workers.check_values(rehearsal(), section, [sys.executable, "-c", code])


def test_processes_are_joined(section):
    check_with(section, "leave(names[:-1], [names[-1] + ': no time'])")
    passed = [one["problem"] for one in section.data["passed"]]
    assert passed == SHARES[0][:-1] + SHARES[1][:-1]
    assert section.left_out == [f"{share[-1]}: no time" for share in SHARES]
    assert section.wrong is None
    counts = {(path, dtype): int(count) for path, dtype, count, _ in section.tables[0].body}
    assert sum(counts.values()) == len(passed)
    assert counts["store", "float32"] == sum(name.startswith("store") for name in passed)
    assert not list(section.file.parent.glob("values-*"))


def test_the_first_wrong_value_ends_the_other_processes(section):
    hangs = "leave(names[:3]); time.sleep(60)"
    began = time.monotonic()
    check_with(section, f"if number == 0:{LEAVES_A_WRONG_VALUE}else:\n    {hangs}")
    assert section.wrong == WRONG
    assert time.monotonic() - began < 50
    assert "process 1 of the small problems was ended from outside at" in section.left_out[-1]
    assert json.loads(section.file.read_text())["wrong"]["problem"] == WRONG.problem


def test_a_wrong_value_is_told_before_a_process_that_breaks(section):
    body = f"if number == 1:\n    time.sleep(0.3){LEAVES_A_WRONG_VALUE}sys.exit('no such thing')"
    check_with(section, body)
    assert section.wrong == WRONG
    assert section.left_out[-1] == (
        f"process 0 of the small problems ended with status 1 at {SHARES[0][0]!r}: "
        f"{len(SHARES[0])} problems were not checked"
    )


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("sys.exit('no such thing')", r"(?s)no such thing.*process 1 .* ended with status 1 at "),
        # What a host without memory does.
        ("os.kill(os.getpid(), 9)", "process 1 .* ended with status -9 at "),
        ("sys.exit(0)", "process 1 .* ended with status 0 at "),
    ],
    ids=["breaks", "killed", "returns"],
)
def test_problems_that_a_process_did_not_reach_are_a_failure(section, end, told):
    body = f"leave(names[:3] if number else names)\nif number:\n    {end}"
    with pytest.raises(RuntimeError, match=told + re.escape(repr(SHARES[1][3]))):
        check_with(section, body)
    assert len(section.data["passed"]) == len(SHARES[0]) + 3


def test_a_kernel_that_hangs_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 0.5)
    section = Section("values", 1.0, tmp_path / "values.json")
    told = "process 1 of the small problems was ended from outside at "
    with pytest.raises(RuntimeError, match=told + re.escape(repr(SHARES[1][2]))):
        check_with(section, "leave(names[:2] if number else names)\ntime.sleep(60 * number)")


def test_a_process_that_writes_much_is_not_held_up(tmp_path):
    section = Section("values", 10.0, tmp_path / "values.json")
    check_with(section, "sys.stderr.write('warning ' * 50000)\nleave(names)")
    assert section.left_out == []


@pytest.fixture
def sections_run(monkeypatch, tmp_path):
    """Runs everything with sections that do as they are told; returns status, record and page."""

    def run(told, *more):
        def started(args, name, seconds, file):
            given[name] = seconds
            if told.get(name) == "breaks":
                return "Traceback\nRuntimeError: out of memory"
            section = Section(name, seconds, file)
            section.tables.append(Table(f"of {name}", ("", "ms"), [("ours", "1.5")]))
            section.left_out = ["a library: not installed"]
            section.wrong = WRONG if told.get(name) == "wrong" else None
            section.save()
            return None if section.wrong is None else "status 1"

        given: dict[str, float] = {}
        run.given = given
        monkeypatch.setattr(program, "_started", started)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        status = program.main(["--rehearse", "--output", str(tmp_path), *more])
        record = json.loads((tmp_path / "record.json").read_text())
        return status, record, (tmp_path / "page.md").read_text()

    return run


def test_all_sections_run_and_are_on_the_page(sections_run, capsys):
    status, record, text = sections_run({})
    assert status == 0
    assert [section["name"] for section in record["sections"]] == list(SECTIONS)
    assert "no time here is one" in record["environment"]["device"]
    assert text.splitlines()[2].startswith("No value was wrong. Sections: values, whole, tiles")
    assert "| ours | 1.5 |" in text
    assert "- left out: a library: not installed" in text
    assert "page.md" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["values", "whole"])
def test_nothing_runs_after_a_wrong_value(sections_run, name, capsys):
    status, record, text = sections_run({name: "wrong"})
    assert status == 1
    assert record["sections"][-1]["name"] == name
    assert record["sections"][-1]["wrong"]["entry"] == [3, 7]
    assert "nothing ran after it" in text
    assert "worst at [3, 7]: expected 0.25, got -1.5" in text
    assert WRONG.repeat in capsys.readouterr().out


def test_a_section_that_breaks_leaves_the_others_alone(sections_run):
    status, record, text = sections_run({"tiles": "breaks"})
    assert status == 1
    assert [s["name"] for s in record["sections"]] == [s for s in SECTIONS if s != "tiles"]
    assert record["failures"] == {"tiles": "Traceback\nRuntimeError: out of memory"}
    assert "## Tiles: failed" in text


def test_correctness_that_breaks_ends_the_run(sections_run):
    status, record, _ = sections_run({"values": "breaks"})
    assert status == 1
    assert record["sections"] == []


def test_time_that_a_section_does_not_use_goes_to_those_that_follow(sections_run):
    sections_run({})
    given, shares = sections_run.given, rehearsal().shares
    whole = 9 * 60 - program.FOR_THE_PAGE - program.LATE
    assert given["values"] == pytest.approx(shares["values"] * whole, rel=0.02)
    assert given[SECTIONS[-1]] == pytest.approx(whole, rel=0.02)
    assert given["losses"] > 1.5 * given["values"]


def test_a_section_without_time_is_left_out_and_no_failure(sections_run):
    status, record, text = sections_run({}, "--minutes", "0.4")
    assert status == 0
    assert sections_run.given == {}
    assert [section["left_out"] for section in record["sections"]] == [
        ["all of it: no time"]
    ] * len(SECTIONS)
    assert record["failures"] == {}
    assert "- left out: all of it: no time" in text


def test_tiles_of_an_earlier_run_are_forgotten(sections_run, tmp_path):
    kept = tmp_path / "tuned_tiles.json"
    kept.write_text("{}")
    sections_run({})
    assert not kept.exists()


def test_without_what_the_step_imports_it_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.training_step", None)
    assert program.main(["--rehearse", "--section", "step", "--output", str(tmp_path)]) == 0
    (line,) = json.loads((tmp_path / "step.json").read_text())["left_out"]
    assert line.startswith("all of it: import of benchmarks.gpu.training_step")


@pytest.mark.parametrize("ends", ["by Ctrl-C", "by itself"])
def test_what_a_section_started_ends_with_it(monkeypatch, tmp_path, ends):
    """The other end of a pipe that the section's process and its child hold open."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    waits = "wait" if ends == "by Ctrl-C" else "exit 0"
    script = f"exec 3> {pipe}; sleep 60 2> /dev/null & echo started >&3; {waits}"
    monkeypatch.setattr(program, "_command", lambda args, name: ["sh", "-c", script])
    args = program._parse(["--output", str(tmp_path)])
    run = partial(program._started, args, "losses", 10.0, tmp_path / "losses.json")
    if ends == "by itself":
        assert run() is None
    else:

        def interrupted(process, timeout=None):
            assert select.select([reader], [], [], 10.0)[0]
            raise KeyboardInterrupt

        monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert os.read(reader, 100) == b"started\n"
    assert select.select([reader], [], [], 10.0)[0]  # "nobody writes any more" comes at once
    assert os.read(reader, 100) == b""
    os.close(reader)


def test_a_section_that_hangs_is_ended_with_what_it_had(monkeypatch, tmp_path):
    monkeypatch.setattr(program, "LATE", 0.5)
    file = tmp_path / "losses.json"
    script = (
        "import pathlib, sys, time; pathlib.Path(sys.argv[-1]).write_text('{}'); time.sleep(60)"
    )
    monkeypatch.setattr(program, "_command", lambda args, name: [sys.executable, "-c", script])
    args = program._parse(["--output", str(tmp_path)])
    assert program._started(args, "losses", 1.0, file) == "ended from outside after 2 s"
    assert file.read_text() == "{}"


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["--output", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().out == f"{program.NO_GPU}\n"
    assert not (tmp_path / "none").exists()


def test_an_unknown_problem_is_answered_with_the_known_ones(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match=r"(?s)statistics forward_kl.*got 'nobody'"):
        program.main(
            ["--rehearse", "--section", "values", "--problem", "nobody", "--output", str(tmp_path)]
        )


def test_the_program_starts_where_only_torch_is_installed():
    """What a GPU machine lacks costs the section that needs it, not the run."""
    lacking = ("rich", "transformers", "pydantic", "matplotlib", "trl", "liger_kernel")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking}))\n"
        "import benchmarks.gpu.__main__, benchmarks.gpu.losses, benchmarks.gpu.values\n"
        "import benchmarks.gpu.whole, benchmarks.gpu.workers"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("setting", [on_a_gpu(), rehearsal()], ids=["gpu", "rehearsal"])
def test_the_shares_of_a_run_fit_its_minutes(setting):
    assert set(setting.shares) == set(SECTIONS)
    assert setting.minutes <= 9
    assert sum(setting.shares.values()) <= 1 + 1e-9
    # Correctness cannot take the time of everything else.
    assert setting.shares["values"] + setting.shares["whole"] < 0.5


def test_the_time_that_losses_keep_for_timing_grows_with_what_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "CHECK_SHAPE", Shape(4, 8, 20))
    known = contenders()
    more = [replace(known["torch"], key=f"more_{number}") for number in range(8)]
    monkeypatch.setattr(losses, "chosen", lambda *_: [known["floor"], known["torch"], *more])
    section = Section("losses", 20.0, tmp_path / "losses.json", now=lambda: 0.0)
    found = losses.compare(replace(rehearsal(), rounds=1), section, Shape(4, 8, 20), "reverse_kl")
    fit = int((20.0 - losses.TO_BEGIN) / losses.TO_TIME)
    assert [entry.key for entry in found.entries] == [
        "floor", "torch", *(contender.key for contender in more[: fit - 2]),
    ]  # fmt: skip
    assert found.failures == {contender.key: "no time" for contender in more[fit - 2 :]}


def test_a_model_in_16_bits_keeps_its_rotary_frequencies():
    """As training does: only weights are rounded."""
    size = ModelSize(layers=1, hidden=64, intermediate=64, heads=2, kv_heads=1, head_dim=32,
                     vocabulary=128)  # fmt: skip
    exact, rounded = (
        StepProblem(StepShape(12, 6, 5, 2), size, dtype=dtype).model
        for dtype in (torch.float32, torch.bfloat16)
    )
    for (name, own), other in zip(rounded.named_buffers(), exact.buffers(), strict=True):
        assert torch.equal(own, other), name
        assert own.dtype == torch.float32, name
    for own, other in zip(rounded.parameters(), exact.parameters(), strict=True):
        assert torch.equal(own, other.to(torch.bfloat16))
    assert rounded.get_output_embeddings().weight is rounded.get_input_embeddings().weight


def test_a_training_step_is_checked_timed_and_measured(tmp_path):
    section = Section("step", 600.0, tmp_path / "step.json")
    training_step.measure_steps(rehearsal(), section)
    names = ["padded rows, sdpa", "shared prefix, loop"]
    assert list(section.data["gradient errors"]) == names
    assert [row[0] for row in section.tables[0].body] == names
    assert section.data[names[1]]["flops"] < section.data[names[0]]["flops"]
    (flash, flex) = section.left_out
    assert flash.startswith("shared prefix, flash: attention: flash cannot run")
    assert flex.startswith("shared prefix, flex")


def test_a_wrong_gradient_of_a_step_is_named(tmp_path, monkeypatch):
    right = training_step.shared

    def wrong(problem, **options):
        step = right(problem, **options)

        def scaled():
            loss = step()
            problem.model.model.layers[1].mlp.up_proj.weight.grad[4, 2] += 1.0
            return loss

        return scaled

    monkeypatch.setattr(training_step, "shared", wrong)
    section = Section("step", 600.0, tmp_path / "step.json")
    with pytest.raises(WrongValueError) as caught:
        training_step.measure_steps(rehearsal(), section)
    assert caught.value.wrong.result == "gradient of model.layers.1.mlp.up_proj.weight"
    assert caught.value.wrong.entry == (4, 2)


def test_plots_are_on_the_page(section):
    section.plots = ["losses.png"]
    assert "![losses.png](losses.png)" in page({"device": "any"}, [left_by(section)], {})
