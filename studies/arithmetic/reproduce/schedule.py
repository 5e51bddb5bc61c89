"""Worker processes of one thread each that work through a plan."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from selfdistill.errors import UserError
from selfdistill.places import alone_in
from selfdistill.progress import progress_bars
from studies.arithmetic.reproduce.budget import job_seconds
from studies.arithmetic.reproduce.job_list import Job
from studies.arithmetic.reproduce.jobs import is_finished, prepare_worker, run_job

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerLostError(UserError):
    """A worker process ended in the middle of a job."""


def run_plan(plan: Sequence[Job], output: Path, *, workers: int, console: Console) -> bool:
    """Do what is left of a plan; finished jobs are skipped, begun ones go on.

    Ctrl-C lets every worker finish and save the step at hand.

    Args:
        plan: jobs whose needs come before them.
        output: the folder of everything.
        workers: processes, of one thread each.
        console: where progress is shown.

    Returns:
        False when an interrupt stopped it.

    Raises:
        PlaceTakenError: another process works in the folder.
        PlanChangedError: a finished job belongs to another plan.
        WorkerLostError: a worker was killed; the same call goes on from there.
    """
    finished = {job.name for job in plan if is_finished(job, output)}
    waiting = [job for job in plan if job.name not in finished]
    running: dict[Future[bool], Job] = {}
    with (
        alone_in(output),
        _one_thread_each(),
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=prepare_worker) as pool,
        progress_bars(console) as bars,
    ):
        bar = bars.add_task(
            "reproduce",
            total=round(sum(map(job_seconds, plan))),
            completed=round(sum(job_seconds(job) for job in plan if job.name in finished)),
            note=f"{len(finished)} of {len(plan)} jobs",
        )
        try:
            while waiting or running:
                for job in _ready(waiting, finished)[: workers - len(running)]:
                    waiting.remove(job)
                    running[pool.submit(run_job, job, output)] = job
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    if not future.result():
                        raise KeyboardInterrupt
                    finished.add(job.name)
                    note = f"{len(finished)} of {len(plan)} jobs, last {job.name}"
                    bars.update(bar, advance=round(job_seconds(job)), note=note)
                    if not console.is_terminal:  # a log has no bars
                        console.print(note)
        except KeyboardInterrupt:
            # The workers got the signal, too.
            pool.shutdown(wait=True, cancel_futures=True)
            return False
        except BrokenExecutor as error:
            raise WorkerLostError(
                "a worker process ended unexpectedly (killed, or out of memory); what is finished "
                "is kept, the same command goes on from there"
            ) from error
    return True


def _ready(waiting: Sequence[Job], finished: set[str]) -> list[Job]:
    return [job for job in waiting if finished.issuperset(job.needs)]


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Set what the workers' libraries read when they are loaded."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
