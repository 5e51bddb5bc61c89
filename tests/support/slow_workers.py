"""Stand-ins for the process in which math-verify runs, slow where they are told to be."""

from __future__ import annotations

import sys

from selfdistill.tasks.answers.pool import WorkerPool

# Answers that never get a verdict, and that end the process; others are decided by their text.
SLOW = "s+l+o+w"
FATAL = "f+a+t+a+l"
_ANSWERING = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    with open({log!r}, "a") as log:
        log.write(answer + "\\n")
    if answer == {slow!r}:
        time.sleep(3600)
    if answer == {fatal!r}:
        os._exit(1)
    print(json.dumps(gold == answer), flush=True)
"""

# Decides nothing before as many processes as `count` are at work.
_TOGETHER = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    open(os.path.join({folder!r}, str(os.getpid())), "w").close()
    while len(os.listdir({folder!r})) < {count}:
        time.sleep(0.01)
    print("true", flush=True)
"""


def answering_pool(log: object, *, size: int = 2, answer_seconds: float = 3600.0) -> WorkerPool:
    """Return a pool whose processes write every answer that they are asked about to `log`."""
    return _pool(
        _ANSWERING.format(log=str(log), slow=SLOW, fatal=FATAL),
        size=size,
        answer_seconds=answer_seconds,
    )


def pool_of_processes_that_wait_for_each_other(folder: object, *, count: int) -> WorkerPool:
    """Return a pool that answers only when so many of its processes are asked at once."""
    code = _TOGETHER.format(folder=str(folder), count=count)
    return _pool(code, size=count, answer_seconds=3600.0)


def _pool(code: str, *, size: int, answer_seconds: float) -> WorkerPool:
    return WorkerPool([sys.executable, "-S", "-c", code], size=size, answer_seconds=answer_seconds)
