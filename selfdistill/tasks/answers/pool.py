"""Processes that answer questions in parallel, and are killed when they do not answer.

Computer algebra takes minutes or gigabytes for some answers, and only a main thread can have a time
limit of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import IO

from selfdistill.tasks.interface import TaskError

Question = tuple[str, str]

# Importing sympy and math-verify takes about two seconds on a quiet machine.
START_SECONDS = 120.0
# The worker gives up by itself after worker.SECONDS of processor time, where it can be interrupted.
ANSWER_SECONDS = 10.0


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Worker:
    """A process with what it is doing.

    Attributes:
        process: prints a line when it is ready, then one for each line it reads.
        due: when it is killed, on the clock of `time.monotonic`.
        ready: False while it starts.
        question: the number of the question that it is at, or None.
    """

    process: subprocess.Popen[str]
    due: float
    ready: bool = False
    question: int | None = None

    @property
    def output(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    @property
    def is_idle(self) -> bool:
        return self.ready and self.question is None


class WorkerPool:
    """Runs a command several times over and hands each process one question at a time.

    Safe to use from several threads; one call runs at a time.

    Args:
        command: prints one line when it is ready; then, for each pair of texts that it reads as a
            line of JSON, prints true, false or null (undecided).
        size: most processes; they are started when there are questions for them.
        answer_seconds: after so long without an answer a process is killed.
    """

    def __init__(
        self, command: Sequence[str], *, size: int, answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        self.command = list(command)
        self.size = size
        self.answer_seconds = answer_seconds
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def ask(
        self, questions: Sequence[Question], *, seconds: float | None = None
    ) -> dict[int, bool | None]:
        """Return the answers by the number of their question.

        Args:
            questions: pairs of texts.
            seconds: a limit for all of them together, from the moment that a process is ready;
                questions that have no answer by then are missing in what is returned.

        Raises:
            TaskError: a process does not start.
        """
        with self._lock:
            try:
                return self._ask(questions, seconds)
            finally:  # what is late must not be taken for the answer to the next question
                for worker in [w for w in self._workers if w.question is not None]:
                    self._drop(worker)

    def _ask(self, questions: Sequence[Question], seconds: float | None) -> dict[int, bool | None]:
        answers: dict[int, bool | None] = {}
        waiting = deque(range(len(questions)))
        deadline: float | None = None
        while len(answers) < len(questions):
            now = time.monotonic()
            if deadline is None and seconds is not None and any(w.ready for w in self._workers):
                deadline = now + seconds
            if deadline is not None and now >= deadline:
                break
            self._give_work(questions, waiting)
            for worker in self._wait(deadline):
                self._read(worker, answers)
            for worker in [w for w in self._workers if not w.is_idle and w.due <= time.monotonic()]:
                self._lose(worker, answers)
        return answers

    def _give_work(self, questions: Sequence[Question], waiting: deque[int]) -> None:
        """Hand waiting questions to idle processes, and start others while there are too few."""
        for worker in [w for w in self._workers if w.is_idle]:
            if not waiting:
                return
            if worker.process.poll() is not None:  # it died between two questions
                self._drop(worker)
                continue
            worker.question = waiting.popleft()
            worker.due = time.monotonic() + self.answer_seconds
            assert worker.process.stdin is not None
            with contextlib.suppress(OSError):  # it died now: there will be no answer
                worker.process.stdin.write(json.dumps(questions[worker.question]) + "\n")
                worker.process.stdin.flush()
        starting = sum(not worker.ready for worker in self._workers)
        while starting < len(waiting) and len(self._workers) < self.size:
            self._start()
            starting += 1

    def _wait(self, deadline: float | None) -> list[_Worker]:
        """Wait for a line of any process, or for the first moment at which one is to be killed."""
        expected = {w.output.fileno(): w for w in self._workers if not w.is_idle}
        moments = [worker.due for worker in expected.values()]
        first = min([*moments, deadline] if deadline is not None else moments)
        # One line answers one question, so no line ever waits in the buffer of the output.
        ready = connection.wait(list(expected), max(0.0, first - time.monotonic()))
        return [expected[number] for number in ready if isinstance(number, int)]

    def _read(self, worker: _Worker, answers: dict[int, bool | None]) -> None:
        line = worker.output.readline()
        if not line:
            self._lose(worker, answers)
        elif worker.question is None:
            worker.ready = True
        else:
            answers[worker.question] = json.loads(line)
            worker.question = None

    def _lose(self, worker: _Worker, answers: dict[int, bool | None]) -> None:
        """Give a process up that is dead or too slow; its question is undecided."""
        self._drop(worker)
        if not worker.ready:
            raise TaskError(
                f"a process that compares answers did not start; `{' '.join(self.command)}` shows "
                "why. Or compare numbers and strings only: task.checker: plain"
            )
        if worker.question is not None:
            answers[worker.question] = None

    def _start(self) -> None:
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the trainer
        )
        weakref.finalize(self, _end, process)
        self._workers.append(_Worker(process, due=time.monotonic() + START_SECONDS))

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _end(worker.process)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was not written yet has no reader any more
                stream.close()
