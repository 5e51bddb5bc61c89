"""Training runs in processes that may be killed, or that share the work of one run.

    python forked_runs.py kill|ranks|stages|failures REQUEST.json

Importing torch and transformers takes seconds; here one process does it and forks its runs, which
is safe because it computes nothing itself and has one thread. The answer is one line of JSON.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from rich.console import Console
from safetensors.torch import save
from tiny_runs import SmoothAdamW
from torch.distributed.tensor import DTensor

import selfdistill.runlog
import selfdistill.training.checkpoint
import selfdistill.training.gradients
import selfdistill.training.loop
from selfdistill.config import Config
from selfdistill.model.parts import gather
from selfdistill.model.weights import TrainedWeights
from selfdistill.rollout.engine import EngineError
from selfdistill.training.distributed import join_ranks
from selfdistill.training.gradients import StudentLoss

torch.set_num_threads(1)

# Where a process is killed, beside random moments: (module, function, most calls before it).
MOMENTS = [
    (selfdistill.training.checkpoint, "save_file", 6),
    (selfdistill.training.checkpoint, "sha256_of", 20),
    (selfdistill.training.checkpoint, "_flush", 24),
    (selfdistill.training.checkpoint.os, "rename", 3),
    (selfdistill.training.checkpoint.os, "replace", 8),
    (selfdistill.training.checkpoint.shutil, "rmtree", 8),
    (selfdistill.training.gradients, "score", 3),
    (selfdistill.training.loop, "judge", 3),
]


def fork(task: Callable[[], object], log: Path) -> int:
    """Run `task` in a new process and return its id; its status is 0 unless the task raises."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        task()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(config: Config) -> None:
    """Train, or go on training."""
    selfdistill.training.loop.train(config, resume=True, console=Console(quiet=True))


def die_at(module: Any, name: str, calls: int, *, before: bool) -> None:
    """Kill this process with SIGKILL right before or after a call of a function."""
    original = getattr(module, name)
    left = calls

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, deadly)


def wait(pid: int, log: Path) -> bool:
    """Return whether the process came to its end; False when it was killed.

    Raises:
        RuntimeError: it failed in any other way.
    """
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise RuntimeError(f"the run failed, status {status}:\n{log.read_text()}")
    return True


def kill(request: dict[str, Any]) -> dict[str, Any]:
    """Kill runs until `kills` have happened, resuming each until it is done."""
    config = Config.model_validate(request["config"])
    folder = config.output_dir
    folder.mkdir(parents=True)
    log = folder / "log"

    def at(name: str) -> Config:
        return config.model_copy(update={"output_dir": folder / name})

    start = time.monotonic()
    wait(fork(lambda: run(at("undisturbed")), log), log)
    seconds = time.monotonic() - start

    chance = random.Random(request["seed"])
    kills: dict[str, int] = {}
    finished: list[str] = []
    while sum(kills.values()) < request["kills"]:
        name = f"killed-{len(finished)}"
        module, function, most = chance.choice(MOMENTS)
        calls, before = chance.randint(1, most), chance.random() < 0.5
        random_moment = chance.random() < 0.4

        def task(
            name: str = name,
            moment: tuple[Any, str, int] | None = None
            if random_moment
            else (module, function, calls),
            before: bool = before,
        ) -> None:
            if moment is not None:
                die_at(*moment, before=before)
            run(at(name))

        pid = fork(task, log)
        if random_moment:
            time.sleep(chance.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)  # at worst a zombie, which nobody has waited for yet
        if wait(pid, log):
            finished.append(name)
        else:
            where = "random" if random_moment else function
            kills[where] = kills.get(where, 0) + 1
    name = f"killed-{len(finished)}"
    wait(fork(lambda: run(at(name)), log), log)
    return {"undisturbed": "undisturbed", "finished": [*finished, name], "kills": kills}


def remember(kind: type) -> list[Any]:
    """Return a list that every instance made from now on is added to."""
    made: list[Any] = []
    original = kind.__init__

    def remembering(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        made.append(self)

    kind.__init__ = remembering
    return made


# Below 32768, from where Linux takes the ports of connections that name none.
# A hundred for each process: those that run at a time have neighbouring numbers.
_ports = itertools.count(10000 + 100 * (os.getpid() % 200))


def together(size: int, task: Callable[[int], object], log: Path, *, failing: bool = False) -> None:
    """Run a task in so many processes, the ranks of one group; each gets its rank.

    Args:
        size: how many.
        task: what each of them does.
        log: takes what they print.
        failing: they may end in any way; else the first one that fails ends them all.
    """
    port = str(next(_ports))

    def join(rank: int) -> None:
        if size > 1:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "lo",
            }
        task(rank)

    processes = [fork(lambda rank=rank: join(rank), log) for rank in range(size)]
    try:
        while processes:
            if failing:
                os.waitpid(processes[0], 0)
            else:
                wait(processes[0], log)
            processes.pop(0)
    finally:
        for pid in processes[1:]:  # the others would wait for one that failed
            os.kill(pid, signal.SIGKILL)


def ranks(request: dict[str, Any]) -> dict[str, Any]:
    """Run each configuration with as many processes as asked, and alone; compare the ranks."""
    torch.optim.AdamW = SmoothAdamW  # type: ignore[misc]
    answers = {}
    for name, case in request["cases"].items():
        config = Config.model_validate(case)
        folder = config.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        for size in (1, 2):

            def task(rank: int, size: int = size, config: Config = config) -> None:
                weights: list[TrainedWeights] = remember(TrainedWeights)
                objectives: list[StudentLoss] = remember(StudentLoss)
                with join_ranks():
                    run(config.model_copy(update={"output_dir": config.output_dir / str(size)}))
                    masters = gather(weights[0].masters, keep=True)
                digest = hashlib.sha256(save(masters)).hexdigest()
                # Of all elements, trained or frozen, the teacher's too, the share on this rank.
                everything = list(objectives[0].parameters())
                parts = [p.to_local() if isinstance(p, DTensor) else p for p in everything]
                held = sum(p.numel() for p in parts) / sum(p.numel() for p in everything)
                (config.output_dir / f"rank-{size}-{rank}").write_text(
                    json.dumps({"digest": digest, "held": held})
                )

            together(size, task, folder / f"log-{size}")
        found = [json.loads((folder / f"rank-2-{rank}").read_text()) for rank in range(2)]
        answers[name] = {
            "ranks_agree": found[0]["digest"] == found[1]["digest"],
            "held": max(of_rank["held"] for of_rank in found),
        }
    return answers


def stages(request: dict[str, Any]) -> dict[str, Any]:
    """Run each case one stage after the other, each going on where the one before ended.

    A stage is (number of processes, settings that differ).
    """
    torch.optim.AdamW = SmoothAdamW  # type: ignore[misc]
    for case in request["cases"].values():
        folder = Path(case["config"]["output_dir"])
        for number, (size, changes) in enumerate(case["stages"]):
            config = Config.model_validate({**case["config"], **changes})
            log = folder.with_name(f"{folder.name}-log-{number}")
            together(size, lambda rank, config=config: run(config), log)
    return {}


def failures(request: dict[str, Any]) -> dict[str, Any]:
    """Let one of the ranks fail when it judges rollouts; return what each of them said.

    A case names the `rank` (null: all go on), what it `does` (raise, kill) and the number of ranks,
    its `size`.
    """
    answers = {}
    for name, case in request["cases"].items():
        config = Config.model_validate(case["config"])
        folder = config.output_dir
        folder.mkdir(parents=True, exist_ok=True)

        def task(rank: int, case: dict[str, Any] = case, config: Config = config) -> None:
            def fail(*args: Any) -> None:
                if case["does"] == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise EngineError("the critic is gone")

            if rank == case["rank"]:
                selfdistill.training.loop.judge = fail
            try:
                run(config)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                (config.output_dir / f"said-{rank}").write_text(said)

        together(case["size"], task, folder / "log", failing=True)
        paths = {rank: folder / f"said-{rank}" for rank in range(case["size"])}
        answers[name] = {r: p.read_text() if p.exists() else None for r, p in paths.items()}
    return answers


if __name__ == "__main__":
    action, path = sys.argv[1:]
    actions = {"kill": kill, "ranks": ranks, "stages": stages, "failures": failures}
    answer = actions[action](json.loads(Path(path).read_text()))
    print(json.dumps(answer))
