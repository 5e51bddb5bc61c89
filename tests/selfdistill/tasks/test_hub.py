"""What the datasets library changes on the way from a file to a row, and what we make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from selfdistill.config import HubTaskConfig
from selfdistill.tasks.hub import hub_rows
from selfdistill.tasks.interface import TaskError
from selfdistill.tasks.rows import Row

datasets = pytest.importorskip("datasets", reason="pip install 'datasets>=3'")
Read = Callable[..., list[Row]]


@pytest.fixture(params=[False, True], ids=["whole", "streaming"])
def read(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Return what writes a file of the answers (or these bytes) and reads it as a data set."""
    datasets.disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"

    def read(*answers: Any, content: bytes | None = None) -> list[Row]:
        folder.mkdir()
        lines = [json.dumps({"q": f"q{i}", "a": answer}) for i, answer in enumerate(answers)]
        data = content if content is not None else "".join(f"{line}\n" for line in lines).encode()
        (folder / "train.jsonl").write_bytes(data)
        config = TypeAdapter(HubTaskConfig).validate_python(
            {
                "name": "hub",
                "path": str(folder),
                "question": "q",
                "answer": "a",
                "splits": {"train": "train"},
                "streaming": request.param,
            }
        )
        return list(hub_rows(config, "train"))

    return read


def answers(rows: list[Row]) -> list[str]:
    return [row.text("a", "answer") for row in rows]


def test_texts_and_numbers_come_as_they_were_written(read: Read) -> None:
    rows = read("2020-01-01", "six", "007")
    assert answers(rows) == ["2020-01-01", "six", "007"]
    assert rows[1].place.endswith("data, split train, row 1")


def test_small_decimals_and_integers_beside_them(read: Read) -> None:
    assert answers(read(0.0000001, 5, 0.1)) == ["0.0000001", "5.0", "0.1"]


def test_integers_of_64_bits_are_exact(read: Read) -> None:
    assert answers(read(2**53 + 1, 7)) == ["9007199254740993", "7"]


def test_dates_have_lost_how_they_were_written(read: Read) -> None:
    rows = read("2020-01-01", "2021-05-06")
    with pytest.raises(TaskError, match=r"row 0: field 'a' .*points in time.*task\.name: jsonl"):
        answers(rows)


@pytest.mark.parametrize("other", [0.5, 2**70], ids=["a decimal", "more than 64 bits"])
def test_large_integers_in_a_column_of_floats_may_have_lost_digits(read: Read, other: Any) -> None:
    rows = read(2**53 + 1, other)
    with pytest.raises(TaskError, match=r"row 0: field 'a' .*float64.*lost.*task\.name: jsonl"):
        answers(rows)


@pytest.mark.parametrize(
    "content",
    [
        b'{"q": "\\ud83d", "a": 1}\n',
        '{"q": "café", "a": 1}\n'.encode("latin-1"),
        b'{"q": "x", "a": 1, "a": 2}\n',
        b'{"q": "x", "a"',
    ],
    ids=["half a character", "latin-1", "a key twice", "cut off"],
)
def test_a_file_that_the_library_cannot_read_is_one_line_with_its_reason(
    read: Read, content: bytes
) -> None:
    with pytest.raises(TaskError, match=r"the datasets library cannot (load|read)") as caught:
        read(content=content)
    assert_one_line_with_its_reason(caught.value)


def test_deep_values_are_refused_or_read_whole(read: Read) -> None:
    """Some versions of the library read them."""
    content = b'{"q": "x", "a": ' + b"[" * 2_000 + b"]" * 2_000 + b"}\n"
    try:
        (row,) = read(content=content)
    except TaskError as error:
        assert_one_line_with_its_reason(error)
    else:
        with pytest.raises(TaskError, match="field 'a'"):  # a list is no answer
            row.text("a", "answer")


def assert_one_line_with_its_reason(error: TaskError) -> None:
    first, *rest = str(error).splitlines()
    assert "data" in first
    assert "generating the dataset" not in first  # that says nothing; its cause does
    assert not rest or "save_to_disk" in rest[0]


def test_narrow_floats_come_as_they_were_written(tmp_path: Path) -> None:
    features = datasets.Features({"q": datasets.Value("string"), "a": datasets.Value("float32")})
    data = datasets.Dataset.from_dict({"q": ["x", "y"], "a": [0.1, 1e-7]}, features=features)
    data.info.splits = None
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "saved"))
    config = HubTaskConfig.model_validate(
        {
            "path": str(tmp_path / "saved"),
            "question": "q",
            "answer": "a",
            "splits": {"train": "train"},
        }
    )
    assert answers(list(hub_rows(config, "train"))) == ["0.1", "0.0000001"]
