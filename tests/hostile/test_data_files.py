"""Files of problems that are broken, foreign or odd: one line says where and what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from selfdistill import cli
from selfdistill.config import TaskConfig
from selfdistill.tasks.build import build_task
from selfdistill.tasks.interface import Task, TaskError

FINE = {"question": "1 + 1", "answer": "2"}


def build(path: Path, **settings: Any) -> Task:
    task = {"name": "jsonl", "splits": {"train": str(path)}, "checker": "plain", **settings}
    return build_task(TypeAdapter(TaskConfig).validate_python(task))


def second_line(text: str) -> bytes:
    return (json.dumps(FINE) + "\n" + text + "\n").encode("utf-8", "surrogatepass")


UTF_16 = json.dumps(FINE).encode("utf-16")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "half a character in the question": (
        second_line('{"question": "a \\ud83d", "answer": "2"}'),
        r"line 2: field 'question' \(task\.question\) has half a character at position 2 .*whole",
    ),
    "half a character in the answer": (
        second_line('{"question": "q", "answer": "\\udc00"}'),
        r"line 2: field 'answer' \(task\.answer\) has half a character at position 0",
    ),
    "half a character, encoded": (
        b'{"question": "a \xed\xa0\xbd", "answer": "2"}\n',
        r"line 1 has the byte 0xed, which is no UTF-8",
    ),
    "Latin-1": (
        second_line("").rstrip() + b'\n{"question": "caf\xe9", "answer": "2"}\n',
        r"line 2 has the byte 0xe9, which is no UTF-8; save the file as UTF-8 .*iconv",
    ),
    "UTF-16": (UTF_16, r"is no UTF-8 text .* but UTF-16 text: save it as UTF-8"),
    "UTF-16, big end first": (b"\xfe\xff" + UTF_16[2:], r"but UTF-16 text: save it as UTF-8"),
    "UTF-16 without a mark": (UTF_16[2:], r"line 1 has zero bytes, .*UTF-16"),
    "gzip": (gzip.compress(second_line("")), r"but gzip: unpack it"),
    "Parquet": (b"PAR1" + bytes(20), r"but Parquet: .*task\.name: hub"),
    "zeros": (bytes(200), r"line 1 has zero bytes"),
    "random bytes": (bytes(range(128, 256)) * 4, r"line 1 has the byte 0x80"),
    "deep lists": (
        second_line('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        r"line 2 is nested too deeply to be read, expected an object .*take the nested field out",
    ),
    "deep objects": (
        second_line('{"a": ' * 100_000 + "1" + "}" * 100_000),
        r"line 2 is nested too deeply",
    ),
    "a key twice": (
        second_line('{"question": "q", "answer": "1", "answer": "2"}'),
        r"line 2 has the key 'answer' more than once, expected it once; remove the one",
    ),
    "one object over several lines": (
        json.dumps(FINE, indent=1).encode(),
        r"line 1 is not JSON: .*; expected one whole object on each line",
    ),
    "one list of all": (
        json.dumps([FINE]).encode(),
        r"line 1 holds a value of type list, expected an object; write each problem on a line",
    ),
    "cut off": (
        second_line('{"question": "q", "ans'),
        r"line 2 is not JSON: .*; expected one whole object",
    ),
    "NaN": (
        second_line('{"question": "q", "answer": NaN}'),
        r"line 2: field 'answer' \(task\.answer\) holds nan, expected text or a number",
    ),
    "Infinity": (
        second_line('{"question": "q", "answer": -Infinity}'),
        r"line 2: field 'answer' \(task\.answer\) holds -inf, expected text or a number",
    ),
    "null": (
        second_line('{"question": null, "answer": "2"}'),
        r"line 2: field 'question' \(task\.question\) holds None, expected text; mend the row",
    ),
    "a number as the question": (
        second_line('{"question": 5, "answer": "2"}'),
        r"line 2: field 'question' \(task\.question\) holds 5, expected text",
    ),
    "a chat as the question": (
        second_line('{"question": [{"role": "user", "content": "q"}], "answer": "2"}'),
        r"line 2: field 'question' .*holds \[\{'role': .*\}\], expected text;",
    ),
    "answers as a list": (
        second_line('{"question": "q", "answer": ["2", "two"]}'),
        r"line 2: field 'answer' .*holds \['2', 'two'\], expected text or a number",
    ),
    "a list of a thousand as the answer": (
        second_line(json.dumps({"question": "q", "answer": ["2"] * 1000})),
        r"line 2: field 'answer' .{1,120}, expected text or a number",
    ),
    "yes or no": (
        second_line('{"question": "q", "answer": false}'),
        r"line 2: field 'answer' \(task\.answer\) holds False, expected text or a number",
    ),
    "a misspelt field": (
        second_line('{"qestion": "q", "answer": "2"}'),
        r"line 2: field 'question' .*is missing, .*the row has qestion, answer",
    ),
    "half a character as a field's name": (
        second_line('{"\\ud83d": "q", "answer": "2"}'),
        r"line 2: field 'question' .*is missing, .*the row has \\ud83d, answer",
    ),
    "nothing": (b"", r"data\.jsonl holds no problem"),
    "spaces": (b"\n  \n\t\n", r"data\.jsonl holds no problem"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    content, message = HOSTILE[kind]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(TaskError, match=message) as caught:
        build(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 500 + len(str(path))
    text.encode()  # it can be printed


def test_integers_of_thousands_of_digits_stay_exact(tmp_path: Path) -> None:
    digits = "7" * 20_000
    path = tmp_path / "data.jsonl"
    path.write_bytes(second_line(f'{{"question": "q", "answer": {digits}, "n": -{digits}}}'))
    problems = build(path).problems(split="train", count=2)
    assert {problem.answer for problem in problems} == {"2", digits}
    long = next(problem for problem in problems if problem.answer == digits)
    task = build(path)
    assert task.check(long, rf"\boxed{{{digits}}}").correct
    assert not task.check(long, rf"\boxed{{{digits[:-1]}8}}").correct


def test_odd_fields_that_nobody_named_are_no_matter(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    odd = '"score": NaN, "text": "\\ud83d", "meta": {"k": 1, "k": 2}, "n": ' + "9" * 9_000
    path.write_bytes(second_line(f'{{"question": "q", "answer": 1e-07, {odd}}}'))
    answers = {p.answer for p in build(path).problems(split="train", count=2)}
    assert answers == {"2", "0.0000001"}
    assert build(path, where={"answer": 1e-07}).size("train") == 1


def test_the_command_prints_the_line_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(HOSTILE["Latin-1"][0])
    config = tmp_path / "config.yaml"
    solver = Path(__file__).resolve().parents[2] / "examples" / "arithmetic" / "solver"
    config.write_text(
        json.dumps(
            {
                "model": str(solver),
                "output_dir": str(tmp_path / "run"),
                "task": {"name": "jsonl", "splits": {"train": str(path)}, "checker": "plain"},
                "method": {"name": "grpo"},
            }
        )
    )
    monkeypatch.setattr("sys.argv", ["selfdistill", "train", str(config)])
    with pytest.raises(SystemExit):
        cli.main()
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert "line 2 has the byte 0xe9" in printed[0]
