"""Runs Triton's Gluon on numpy: the operations that benchmarks/hopper/kernel.py uses, no more.

Triton interprets no Gluon. Here each partition of each program of a cluster is a thread, one runs
at a time, and at every barrier and copy a seeded schedule chooses who goes on (schedule.py).
Copies and products of matrices take effect when the schedule says, buffers hold NaN until then, and
vector clocks show what was not waited for (memory.py). launch.py runs a kernel, translate.py makes
its functions plain Python, with a fault planted in their source where a test wants one.

A tensor is the whole tensor of a cluster in each of its programs, of which a program stores its own
part, the rows that the layouts give it: every layout here divides the first axis, or nothing.
Layouts within a program mean nothing here: the compiler checks them, and values do not depend on
them.
"""

from __future__ import annotations

from gluon_emulator.launch import launch
from gluon_emulator.schedule import Deadlock, Fault, Race

__all__ = ["Deadlock", "Fault", "Race", "launch"]
