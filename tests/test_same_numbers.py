"""What the comparison of two versions' runs sees, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from same_numbers import main

STEP = {"step": 1, "loss": 0.5, "kl": None, "seconds": {"rollout": 1.5}, "peak_rss_mib": 9.0}


def write(folder: Path, *records: object, result: object = None) -> str:
    folder.mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    return str(folder)


def test_times_and_memory_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "before", STEP)
    after = write(tmp_path / "after", {**STEP, "seconds": {"rollout": 2.0}, "peak_rss_mib": 8.0})
    assert main(before, after) == 0
    assert capsys.readouterr().out.endswith("2 files compared, 0 differences\n")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": 0.5000000000000001}, "metrics.jsonl[0].loss: 0.5 before, 0.5000000000000001"),
        ({"loss": float("nan")}, "metrics.jsonl[0].loss: 0.5 before, nan after"),
        ({"step": 1.0}, "metrics.jsonl[0].step: 1 before, 1.0 after"),
        ({"more": 1}, "metrics.jsonl[0].more: only after"),
    ],
)
def test_the_last_bit_counts(
    changes: dict[str, object], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = write(tmp_path / "a", STEP), write(tmp_path / "b", {**STEP, **changes})
    assert main(before, after) == 1
    assert told in capsys.readouterr().out


def test_a_missing_step_or_file_counts(tmp_path: Path) -> None:
    before = write(tmp_path / "before", STEP, STEP)
    assert main(before, write(tmp_path / "after", STEP)) == 1
    (tmp_path / "empty").mkdir()
    assert main(before, str(tmp_path / "empty")) == 1
    assert main(str(tmp_path / "empty"), str(tmp_path / "empty")) == 1
