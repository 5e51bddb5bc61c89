"""`make gpu` rehearsed: each section's kernels under the interpreter, with a stand-in clock."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from specialised_cases import emulated_sweep, hopper, needs_clusters

from benchmarks import checks
from benchmarks.checks import WrongResultError
from benchmarks.gpu import losses, specialised, tiles, values, whole, workers
from benchmarks.gpu.section import Section, WrongValueError
from benchmarks.gpu.setting import StandInClock, rehearsal
from benchmarks.hopper.sweep import SpecialisedBackend
from benchmarks.problems import Shape
from selfdistill_kernels.backends.triton import backend, gather
from selfdistill_kernels.backends.triton.backend import TritonBackend
from selfdistill_kernels.backends.triton.plan import INTERPRETER, configuration, key_of
from selfdistill_kernels.backends.triton.tuned_tiles import read_tuned
from selfdistill_kernels.statistics import Column

SETTING = rehearsal()
CASES = {case.name: case for case in values.cases(SETTING.dtypes, SETTING.sizes)}


@pytest.fixture
def section(tmp_path):
    return Section("any", 600.0, tmp_path / "any.json")


def first(path: str, **wanted: object) -> values.Case:
    return next(
        case
        for case in CASES.values()
        if case.path == path and all(getattr(case, k) == v for k, v in wanted.items())
    )


@pytest.mark.parametrize("path", values.PATHS)
def test_each_path_is_held_against_float64(path):
    case = first(path, masked=True, vocabulary=75)
    assert 0.0 < values.check(case, "cpu") <= 1.0


def test_every_objective_dtype_and_path_is_among_the_cases():
    found = values.cases(values.DTYPES, SETTING.sizes)
    for name in ("path", "objective", "dtype"):
        expected = {"path": values.PATHS, "objective": values.OBJECTIVES, "dtype": values.DTYPES}
        assert {getattr(case, name) for case in found} == set(expected[name])
    assert len({case.name for case in found}) == len(found)
    shares = [workers.share_of(SETTING, n) for n in range(SETTING.workers)]
    assert sorted(c.name for share in shares for c in share) == sorted(CASES)


def test_the_first_wrong_value_ends_the_work_and_tells_how_to_repeat_it(section, monkeypatch):
    """A gradient kernel that leaves out a tenth of one element of dH."""
    right = backend.slab_gradient

    def wrong(problem, selection, student, teacher, statistics, weights, scale, start, stop, dz):
        right(problem, selection, student, teacher, statistics, weights, scale, start, stop, dz)
        dz[2, 5] *= 0.9

    monkeypatch.setattr(backend, "slab_gradient", wrong)
    chosen = [first("statistics"), first("gradient"), first("store")]
    workers.work(SETTING, section, chosen)
    assert [one["problem"] for one in section.data["passed"]] == [chosen[0].name]
    assert section.left_out == [f"{chosen[2].name}: no time"]
    found = section.wrong
    assert found.kernels.startswith("gradient, product")
    assert found.problem == chosen[1].name
    assert found.result in ("d hidden", "d weight")
    assert found.error > found.allowed
    assert abs(found.got - found.expected) > 1e-4 * abs(found.expected)
    assert found.repeat == (
        f"python -m benchmarks.gpu --section values --problem '{chosen[1].name}'"
    )
    assert json.loads(section.file.read_text())["wrong"]["problem"] == chosen[1].name


def test_a_nan_is_a_wrong_value_and_the_worst(monkeypatch):
    right = backend.merge

    def wrong(problem, selection, partial, statistics):
        right(problem, selection, partial, statistics)
        statistics[3, 4] = float("nan")

    monkeypatch.setattr(backend, "merge", wrong)
    with pytest.raises(WrongValueError, match="student logprob") as caught:
        values.check(first("statistics"), "cpu")
    assert caught.value.wrong.entry == (3,)


def test_work_ends_with_its_time(tmp_path):
    ticks = iter(range(0, 1000, 50))
    section = Section("values", 120.0, tmp_path / "v.json", now=lambda: float(next(ticks)))
    chosen = list(CASES.values())[:6]
    workers.work(SETTING, section, chosen)
    assert 0 < len(section.data["passed"]) < 6
    assert len(section.left_out) == 6 - len(section.data["passed"])


def test_a_real_size_is_compared_on_every_path(section):
    whole.check_whole(SETTING, section)
    assert len(section.data["errors"]) == 3 * 3 + 2
    assert section.left_out == []


def test_a_wrong_value_at_a_real_size_is_named(section, monkeypatch):
    right = backend.gather_rows

    def wrong(source, index, dtype, launch, scale=None):
        to = right(source, index, dtype, launch, scale)
        to[10, 3] += 0.01
        return to

    monkeypatch.setattr(backend, "gather_rows", wrong)
    with pytest.raises(WrongValueError, match="row_statistics, row_gradient") as caught:
        whole.check_whole(SETTING, section)
    assert caught.value.wrong.result == "d hidden"
    assert caught.value.wrong.entry == (10, 3)


@pytest.fixture
def small_tiles(monkeypatch):
    """A tile beside the shipped one, on a problem of three tokens, timed once."""
    shipped = configuration(INTERPRETER, "sweep", 4)
    monkeypatch.setattr(tiles, "candidates", lambda: [replace(shipped, stages=3)])
    monkeypatch.setattr(tiles, "ROUNDS", 1)
    return replace(SETTING, tuned=Shape(3, 16, 70))


def test_tiles_are_timed_and_kept(section, small_tiles):
    tiles.time_tiles(small_tiles, section, StandInClock())
    kept = read_tuned(section.file.with_name(tiles.FILE))
    assert set(kept) == {key_of(INTERPRETER, kind, 4, heavy=True) for kind in tiles.KINDS}
    # The stand-in clock runs, so that the first is the fastest: the shipped one.
    assert [row[1] for row in section.tables[0].body] == [row[3] for row in section.tables[0].body]
    assert [row[5] for row in section.tables[0].body] == ["2 of 2", "2 of 2"]


def test_tiles_are_compiled_by_several_processes(section, small_tiles, monkeypatch):
    run = []
    monkeypatch.setattr(tiles, "_runner", lambda *_: lambda kind, tile: run.append((kind, tile)))
    for number in range(small_tiles.workers):
        tiles.compile_share(small_tiles, section, number)
    everything = [(k, t) for k in tiles.KINDS for t in tiles.ordered(INTERPRETER, k, 4)]
    assert len(run) == len(everything)
    assert set(run) == set(everything)


def test_without_time_one_tile_is_timed(tmp_path, small_tiles):
    section = Section("tiles", 0.0, tmp_path / "t.json")
    tiles.time_tiles(small_tiles, section, StandInClock())
    assert [row[5] for row in section.tables[0].body] == ["1 of 2", "1 of 2"]


def test_losses_are_checked_timed_and_measured(section, monkeypatch):
    keys = {"floor", "ours", "ours_slabs", "torch", "core", "trl"}
    monkeypatch.setattr(checks, "CHECK_SHAPE", Shape(12, 16, 70))
    real = losses.chosen
    monkeypatch.setattr(losses, "chosen", lambda *given: [c for c in real(*given) if c.key in keys])
    losses.compare_losses(replace(SETTING, rounds=1, shapes=(Shape(6, 16, 72),)), section)
    divergence, entropy = section.data["problems"]
    timed = [entry["key"] for entry in divergence["entries"]]
    assert timed == ["floor", "ours", "ours_slabs", "torch", "trl"]
    ours = divergence["entries"][1]
    assert ours["timing"]["seconds"] == [
        6 / 1e3
    ]  # the stand-in's: first after a discarded round of five
    assert ours["peak_extra_bytes"] is not None
    assert {"ours", "torch"} < {entry["key"] for entry in entropy["entries"]}
    assert "selfdistill" in section.tables[0].body[1][0]


def test_a_loss_that_is_wrong_ends_the_section(section, monkeypatch):
    monkeypatch.setattr(checks, "CHECK_SHAPE", Shape(12, 16, 70))
    right = gather.gather_rows
    monkeypatch.setattr(backend, "gather_rows", lambda *given, **more: right(*given, **more) * 1.01)
    with pytest.raises(WrongResultError, match="ours"):
        losses.compare_losses(replace(SETTING, rounds=1), section)


def test_what_there_is_no_time_for_is_named(tmp_path):
    section = Section("losses", 1.0, tmp_path / "losses.json")
    losses.compare_losses(SETTING, section)
    assert section.left_out == [
        "reverse_kl at 24/16/264: no time", "cross_entropy at 24/16/264: no time",
    ]  # fmt: skip
    assert section.tables == []


class OnTheEmulator(SpecialisedBackend):
    """The specialised sweep of a GPU, and the kernels around it under the interpreter."""

    def statistics(self, inputs, objective, workspace):
        def emulated(problem, selection, student, teacher):
            return emulated_sweep(problem, selection, student, teacher, cluster=self._form.cluster)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "sweep", emulated)
            return TritonBackend().statistics(inputs, objective, workspace)


@pytest.fixture
def on_a_hopper(monkeypatch):
    monkeypatch.setattr(specialised, "Machine", SimpleNamespace(of=lambda device: hopper(2)))
    monkeypatch.setattr(specialised, "SpecialisedBackend", OnTheEmulator)
    monkeypatch.setattr(specialised, "SIZES", ((70, 64, 131),))
    return replace(SETTING, tuned=Shape(5, 64, 130), dtype="bfloat16")


@needs_clusters
def test_the_specialised_sweep_is_checked_and_timed_beside_todays(on_a_hopper, section):
    specialised.compare_sweeps(on_a_hopper, section)
    assert section.left_out == []
    (table,) = section.tables
    assert [line[0] for line in table.body] == [
        "today's", "specialised, clusters of 2", "specialised, clusters of 1",
    ]  # fmt: skip
    assert all(float(line[-1]) < 1e-4 for line in table.body)
    assert all(len(times) == on_a_hopper.rounds for times in section.data["rounds"].values())


@needs_clusters
def test_a_wrong_specialised_sweep_is_not_timed(on_a_hopper, section, monkeypatch):
    right = OnTheEmulator.statistics

    def wrong(self, inputs, objective, workspace):
        statistics = right(self, inputs, objective, workspace)
        statistics[2, Column.DIVERGENCE] *= 1.01
        return statistics

    monkeypatch.setattr(OnTheEmulator, "statistics", wrong)
    with pytest.raises(WrongValueError, match="clusters of 2, merge") as caught:
        specialised.compare_sweeps(on_a_hopper, section)
    assert caught.value.wrong.repeat == "python -m benchmarks.gpu --section specialised"
    assert section.tables == []


def test_another_gpu_leaves_the_specialised_sweep_out(section):
    specialised.compare_sweeps(SETTING, section)
    assert section.left_out == ["all of it: the kernel is for sm_90, this is interpreter"]
