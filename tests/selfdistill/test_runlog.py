from __future__ import annotations

from pathlib import Path

import pytest

from selfdistill.runlog import Clock, JsonLines, peak_rss_mib, write_atomically


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    assert log.read() == []
    for step in range(3):
        log.append({"step": step, "value": step / 3})
    log.path.write_text(log.path.read_text()[:-5])
    assert log.read() == [{"step": 0, "value": 0.0}, {"step": 1, "value": 1 / 3}]


def test_what_lies_after_a_step_is_forgotten(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    for step in range(4):
        log.append({"step": step})
    log.keep_until(1)
    log.append({"step": 2, "again": True})
    assert log.read() == [{"step": 0}, {"step": 1}, {"step": 2, "again": True}]


def test_a_failed_write_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, "old")

    def fail(*args: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_phases_add_up() -> None:
    clock = Clock()
    for _ in range(2):
        with clock("a"):
            pass
    with pytest.raises(KeyError), clock("b"):
        raise KeyError
    assert set(clock.seconds) == {"a", "b"}
    assert all(seconds >= 0 for seconds in clock.seconds.values())


def test_peak_memory_is_that_of_a_python_with_torch() -> None:
    assert 50 < peak_rss_mib() < 50_000
