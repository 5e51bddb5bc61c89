from __future__ import annotations

from pathlib import Path

import pytest

from selfdistill.tasks.interface import TaskError
from selfdistill.tasks.json_lines import jsonl_rows


def test_each_line_is_a_row_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"q": "é"}\r\n\n{"q": "b", "n": {"x": 1}}'.encode())
    rows = list(jsonl_rows(path))
    assert [row.fields for row in rows] == [{"q": "é"}, {"q": "b", "n": {"x": 1}}]
    assert [row.place for row in rows] == [f"{path}, line 1", f"{path}, line 3"]


def test_numbers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 0.10, "b": 1e-07, "c": %s, "d": 9007199254740993}\n' % ("7" * 5_000))
    (row,) = jsonl_rows(path)
    texts = [row.text(field, "answer") for field in "abcd"]
    assert texts == ["0.10", "0.0000001", "7" * 5_000, "9007199254740993"]
    assert row.fields["a"] == 0.1  # as task.where compares it


def test_what_nobody_asks_for_may_be_odd(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "a", "score": NaN, "meta": {"k": 1, "k": 2}, "junk": "\\ud83d"}\n')
    (row,) = jsonl_rows(path)
    assert row.text("q", "question") == "a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"is not JSON: .* at character 3; expected one whole object on each line"),
        ('{"q": "x"} {"q": "y"}', r"is not JSON: Extra data at character 12"),
        (
            '[{"q": "x"}]',
            r"holds a value of type list, expected an object; write each problem on a line of its",
        ),
        ("5", r"holds a value of type int, expected an object"),
        ('{"q": "x", "q": "y", "a": 1}', r"has the key 'q' more than once, expected it once"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "fine"}\n' + line + "\n")
    with pytest.raises(TaskError, match=rf"a\.jsonl, line 2 {message}") as caught:
        list(jsonl_rows(path))
    assert "\n" not in str(caught.value)


def test_a_place_without_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task\.splits: cannot read .*absent: No such file"):
        list(jsonl_rows(tmp_path / "absent"))
    with pytest.raises(TaskError, match=r"task\.splits: cannot read .*Is a directory"):
        list(jsonl_rows(tmp_path))
