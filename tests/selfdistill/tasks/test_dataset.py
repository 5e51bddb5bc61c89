from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from selfdistill.config import JsonlTaskConfig, TaskConfig
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.build import build_task, held_out_problems, training_problems
from selfdistill.tasks.dataset import load_dataset_task
from selfdistill.tasks.interface import SPLITS, Problem, Task, TaskError

RECORDS = [
    {"q": f"What is {i} + {i}?", "a": 2 * i, "s": f"{i} + {i} = {2 * i}", "n": i, "kind": i % 2}
    for i in range(300)
]
FIELDS = {"question": "q", "answer": "a", "reference": "s", "checker": "plain"}


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def build(**settings: Any) -> Task:
    return build_task(TypeAdapter(TaskConfig).validate_python({**FIELDS, **settings}))


def everything(task: Task) -> dict[str, list[Problem]]:
    return {s: task.problems(split=s, count=task.size(s) or 0) for s in SPLITS}


def test_one_file_is_cut_by_the_hash_of_the_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", RECORDS)
    shares = {"train": 0.6, "dev": 0.3, "test": 0.1}
    task = build(name="jsonl", splits={"all": path, "shares": shares}, id="n")
    splits = everything(task)
    ids = [problem.id for problems in splits.values() for problem in problems]
    assert Counter(ids) == Counter(str(i) for i in range(300))  # every one, and only once
    for split, share in shares.items():
        assert len(splits[split]) / 300 == pytest.approx(share, abs=0.08)
    by_id = {problem.id: problem for problems in splits.values() for problem in problems}
    assert by_id["7"] == Problem("7", "What is 7 + 7?", "14", "7 + 7 = 14")
    # Where a problem belongs does not depend on what else is in the file.
    write(tmp_path / "all.jsonl", RECORDS[:50])
    fewer = everything(build(name="jsonl", splits={"all": path, "shares": shares}, id="n"))
    for split in SPLITS:
        assert {p.id for p in fewer[split]} <= {p.id for p in splits[split]}


def test_one_file_for_each_split(tmp_path: Path) -> None:
    sources = {
        "train": write(tmp_path / "train.jsonl", RECORDS[:5]),
        "test": write(tmp_path / "test.jsonl", RECORDS[5:8]),
    }
    task = build(name="jsonl", splits=sources)
    assert [task.size(split) for split in SPLITS] == [5, 0, 3]
    with pytest.raises(TaskError, match=r"1 dev problems .* has 0: ask for fewer"):
        task.problems(split="dev", count=1)
    with pytest.raises(ValueError, match="split: got 'trian'"):
        task.size("trian")


def test_splits_that_overlap_are_refused(tmp_path: Path) -> None:
    spaced = {**RECORDS[3], "q": "What  is 3 + 3?\n", "n": 77}
    sources = {
        "train": write(tmp_path / "train.jsonl", RECORDS[:5]),
        "test": write(tmp_path / "test.jsonl", [spaced]),
    }
    with pytest.raises(
        TaskError, match=r"task.splits: test and train overlap: problem '77' .* of '3' of train"
    ):
        build(name="jsonl", splits=sources, id="n")


def test_a_question_counts_once(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", [*RECORDS[:4], *RECORDS[:4], RECORDS[4]])
    task = build(name="jsonl", splits={"train": path})
    assert task.size("train") == 5
    assert build(name="jsonl", splits={"train": path}, limit=3).size("train") == 3
    assert build(name="jsonl", splits={"train": path}, where={"kind": 1}).size("train") == 2


def test_order_depends_on_the_seed_alone_and_starts_the_same(tmp_path: Path) -> None:
    task = build(name="jsonl", splits={"train": write(tmp_path / "a.jsonl", RECORDS[:30])})
    order = task.problems(split="train", count=30, seed=1)
    assert task.problems(split="train", count=9, seed=1) == order[:9]
    assert task.problems(split="train", count=30, seed=2) != order
    assert {p.id for p in order} == {p.id for p in task.problems(split="train", count=30)}


def test_training_goes_through_whole_epochs(tmp_path: Path) -> None:
    task = build(name="jsonl", splits={"train": write(tmp_path / "a.jsonl", RECORDS[:10])})
    problems = training_problems(task, count=25, seed=4)
    epochs = [[p.id for p in problems[start : start + 10]] for start in (0, 10, 20)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == 10
    assert epochs[0] != epochs[1]
    assert training_problems(task, count=7, seed=4) == problems[:7]
    test_only = build(name="jsonl", splits={"test": write(tmp_path / "b.jsonl", RECORDS[:3])})
    with pytest.raises(TaskError, match="no train problems"):
        training_problems(test_only, count=1, seed=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl, line 2 is not JSON"),
        ("[1]", r"a\.jsonl, line 2 holds a value of type list"),
        ('{"q": "x", "s": "y"}', r"line 2: field 'a' \(task\.answer\) is missing, .*q, s"),
        ('{"q": " ", "a": 1, "s": "y"}', r"line 2: field 'q' \(task\.question\) holds ' '"),
        ('{"q": "x", "a": true, "s": "y"}', r"field 'a' \(task\.answer\) holds True"),
        ('{"q": "x", "a": 1, "s": "y", "n": 0}', r"line 2: the id '0' was given to another"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + line + "\n")
    with pytest.raises(TaskError, match=message):
        build(name="jsonl", splits={"train": str(path)}, id="n" if "given" in message else None)


def test_a_source_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"absent\.jsonl: No such file"):
        build(name="jsonl", splits={"train": str(tmp_path / "absent.jsonl")})
    path = write(tmp_path / "a.jsonl", RECORDS[:2])
    with pytest.raises(TaskError, match=r"a\.jsonl holds no problem .*'kind': 7"):
        build(name="jsonl", splits={"train": path}, where={"kind": 7})


def test_answers_are_checked_and_the_format_is_strict(tmp_path: Path) -> None:
    task_splits = {"train": write(tmp_path / "a.jsonl", RECORDS[5:6])}
    task = build(name="jsonl", splits=task_splits)
    (problem,) = task.problems(split="train", count=1)
    right = task.check(problem, "<step_1> 5 + 5 = 10 <answer> $10$")
    assert (right.answer, right.correct, right.strict, right.complete) == ("$10$", True, True, True)
    bare = task.check(problem, r"It is \boxed{10.0}")
    assert (bare.correct, bare.strict) == (True, False)
    assert task.strict_means == "in the step format"
    other = build(name="jsonl", splits=task_splits, instruction="Say the number.")
    assert other.strict_means == ""  # nobody asked for steps
    wrong = task.check(problem, "<step_1> 5 + 5 = 11 <answer> 11")
    assert (wrong.correct, wrong.strict, wrong.complete) == (False, False, True)
    cut = task.check(problem, "<step_1> 5 + 5 = 10")
    assert (cut.answer, cut.correct, cut.complete) == (None, False, False)
    assert task.majorities([["10", "11", "$10.0$"], ["11"]]) == ["10", "11"]
    assert "<step_1>" in task.instruction
    assert "<answer>" in task.instruction


@pytest.fixture
def dataset() -> Any:
    datasets = pytest.importorskip("datasets", reason="pip install 'datasets>=3'")
    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(RECORDS[:40])


def test_hub_reads_what_save_to_disk_wrote(tmp_path: Path, dataset: Any) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.DatasetDict({"cot": dataset, "rest": dataset}).save_to_disk(str(folder))
    task = build(name="hub", path=str(folder), splits={"all": "cot"}, where={"kind": 0})
    splits = everything(task)
    assert sum(map(len, splits.values())) == 20
    assert splits["train"][0].reference
    with pytest.raises(TaskError, match=r"no split 'cut', only cot, rest"):
        build(name="hub", path=str(folder), splits={"train": "cut"})
    # The same data from a file: the same problems in the same splits.
    path = write(tmp_path / "a.jsonl", RECORDS[:40])
    assert everything(build(name="jsonl", splits={"all": path}, where={"kind": 0})) == splits


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_reads_a_folder_of_data_files(
    tmp_path: Path, dataset: Any, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    dataset.to_parquet(str(folder / "train.parquet"))
    task = build(
        name="hub", path=str(folder), splits={"train": "train"}, streaming=streaming, limit=11
    )
    assert task.size("train") == 11


def test_a_data_set_that_cannot_be_had_says_what_to_do(
    tmp_path: Path, dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TaskError, match=r"(?s)cannot load split 'x' of .*save_to_disk"):
        build(name="hub", path=str(tmp_path / "absent" / "set"), splits={"train": "x"})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"pip install 'datasets>=3'"):
        build(name="hub", path="x", splits={"train": "x"})


def test_answers_in_solutions_and_exact_counts(tmp_path: Path) -> None:
    path = tmp_path / "gsm.jsonl"
    rows = [{"question": f"What is {i} + 1?", "answer": f"So.\n#### {i + 1}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "name": "jsonl",
        "answer_is": "in_solution",
        "answer_forms": ["hashes"],
        "splits": {"all": str(path), "counts": {"train": 20, "dev": 6, "test": 4}},
    }
    task = load_dataset_task(JsonlTaskConfig.model_validate(settings))
    assert [task.size(split) for split in ("train", "dev", "test")] == [20, 6, 4]
    (problem,) = task.problems(split="dev", count=1)
    assert problem.answer == str(int(problem.question.split()[2]) + 1)
    assert task.check(problem, f"#### {problem.answer}").correct
    assert not task.check(problem, f"<answer> {problem.answer}").correct
    settings["splits"] = {"all": str(path), "counts": {"train": 20, "dev": 21}}
    with pytest.raises(TaskError, match=r"there are 40 problems, but .* ask for 41"):
        load_dataset_task(JsonlTaskConfig.model_validate(settings))
    path.write_text(json.dumps({"question": "What?", "answer": "3"}) + "\n")
    with pytest.raises(TaskError, match=r"line 1: field 'answer' .* gives no final answer"):
        load_dataset_task(JsonlTaskConfig.model_validate(settings))


def test_an_evaluation_asks_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "What?", "answer": "3"}) + "\n")
    config = JsonlTaskConfig.model_validate({"splits": {"train": str(path)}})
    task = load_dataset_task(config)
    assert len(held_out_problems(task, split="train", count=100)) == 1
    with pytest.raises(TaskError, match="no dev problems: give it some, or say how many"):
        held_out_problems(task, split="dev", count="all")
    with pytest.raises(TaskError, match="as many test problems as anybody asks for"):
        held_out_problems(ArithmeticTask(step_counts=(1,)), split="test", count="all")
