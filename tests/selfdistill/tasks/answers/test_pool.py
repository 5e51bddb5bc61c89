from __future__ import annotations

import threading
from pathlib import Path

import pytest
from slow_workers import FATAL, SLOW, answering_pool, pool_of_processes_that_wait_for_each_other

from selfdistill.tasks.answers import pool as pool_module
from selfdistill.tasks.answers.pool import WorkerPool
from selfdistill.tasks.interface import TaskError


def test_every_answer_goes_to_its_question(tmp_path: Path) -> None:
    pool = answering_pool(tmp_path / "log")
    questions = [(str(i), str(i % 3)) for i in range(9)]
    assert pool.ask(questions) == {i: i < 3 for i in range(9)}
    assert pool.ask([]) == {}


def test_processes_work_at_the_same_time(tmp_path: Path) -> None:
    pool = pool_of_processes_that_wait_for_each_other(tmp_path, count=3)
    assert pool.ask([("a", "b")] * 3) == {0: True, 1: True, 2: True}


def test_a_process_that_is_too_slow_is_killed_and_replaced(tmp_path: Path) -> None:
    pool = answering_pool(tmp_path / "log", size=1, answer_seconds=2.0)
    assert pool.ask([("1", SLOW), ("2", "2")]) == {0: None, 1: True}
    assert pool.ask([("4", "4")]) == {0: True}


def test_a_process_that_dies_leaves_its_question_undecided(tmp_path: Path) -> None:
    pool = answering_pool(tmp_path / "log", size=1)
    assert pool.ask([("1", FATAL), ("2", "2")]) == {0: None, 1: True}


def test_a_process_that_died_in_between_costs_no_answer(tmp_path: Path) -> None:
    pool = answering_pool(tmp_path / "log", size=1)
    assert pool.ask([("1", "1")]) == {0: True}
    (worker,) = pool._workers
    worker.process.kill()
    worker.process.wait()
    assert pool.ask([("2", "2")]) == {0: True}


def test_one_limit_holds_for_all_questions_together(tmp_path: Path) -> None:
    pool = answering_pool(tmp_path / "log")
    answers = pool.ask([("1", "1"), *[("2", SLOW)] * 50, ("3", "3")], seconds=1.0)
    assert answers.get(0, True) is True
    assert set(answers) <= {0}  # the slow ones hold both processes until the limit
    assert pool.ask([("4", "4")]) == {0: True}


def test_an_interrupt_leaves_no_answer_behind_for_the_next_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = answering_pool(tmp_path / "log", size=1)
    assert pool.ask([("0", "0")]) == {0: True}
    wait = pool._wait

    def interrupt(deadline: float | None) -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.ask([("1", "1")])
    monkeypatch.setattr(pool, "_wait", wait)
    assert pool.ask([("2", "3")]) == {0: False}


def test_any_thread_may_ask(tmp_path: Path) -> None:
    pool = answering_pool(tmp_path / "log")
    found: dict[int, bool | None] = {}

    def ask(k: int) -> None:
        found[k] = pool.ask([(str(k), str(k))])[0]

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)


def test_processes_start_only_for_questions_that_wait(tmp_path: Path) -> None:
    pool = answering_pool(tmp_path / "log", size=3)
    assert pool._workers == []
    pool.ask([("1", "1")])
    assert len(pool._workers) == 1


def test_a_process_that_does_not_start_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match=r"did not start; `/bin/false -m x` shows why.*plain"):
        WorkerPool(["/bin/false", "-m", "x"], size=1).ask([("x", "y")])
    monkeypatch.setattr(pool_module, "START_SECONDS", 0.2)
    with pytest.raises(TaskError, match="did not start"):
        WorkerPool(["/bin/sleep", "3600"], size=1).ask([("x", "y")])
