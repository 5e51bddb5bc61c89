"""Ctrl-C and SIGTERM: the first one is a request, and what is promised can be kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from rich.console import Console

from selfdistill.visible import say


@dataclass
class Interrupt:
    """Whether somebody asked the run to stop, and what would become of what is under way.

    Attributes:
        requested: whether somebody asked the run to stop.
        doing: what is under way.
        step: the step that is taken, or the one that is evaluated.
        saved: the step of the last checkpoint, or None.
        launched: several processes that a launcher started, which may end them sooner.
    """

    requested: bool = False
    doing: Literal["step", "evaluation"] = "step"
    step: int = 0
    saved: int | None = None
    launched: bool = False

    def answer(self) -> str:
        """Say what happens now, and no more than that."""
        if self.doing == "step":
            now = f"Stopping when step {self.step} is finished and saved"
        else:
            now = f"Giving up the evaluation after step {self.step} unless it is about to end"
            if self.step > (self.saved or 0):
                now += ", then saving that step"
        # torchrun sends one signal, waits, and then kills.
        soon = ", if the launcher waits so long (torchrun: 30 seconds)" if self.launched else ""
        left = "no checkpoint" if self.saved is None else f"the checkpoint of step {self.saved}"
        return f"{now}{soon}; once more to stop at once, which leaves {left}."


@contextmanager
def deferred_interrupt(console: Console, *, launched: bool = False) -> Iterator[Interrupt]:
    """Turn the first Ctrl-C or SIGTERM into a request; the second one acts as usual."""
    interrupt = Interrupt(launched=launched)
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # only the main thread may set signal handlers
        return
    previous: dict[int, Any] = {}

    def request(signum: int, frame: FrameType | None) -> None:
        interrupt.requested = True
        for number, handler in previous.items():
            signal.signal(number, handler)
        say(console, interrupt.answer())

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, request)
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
