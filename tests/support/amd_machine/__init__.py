"""Runs gfx942 and gfx950 machine code on the CPU, so that tests see what a GPU would execute.

code_object.py reads what the compiler wrote, program.py decodes it (with tinygrad's decoder, the
only outside part), wave.c executes one wave, execute.py schedules waves and workgroups, and
launch.py is a launcher of the Triton backend that does all of it.

Not modelled: loads complete at once, so a missing s_waitcnt is not seen; matrix products sum in
double; exp, log and rcp are exactly rounded.
"""

import pytest

pytest.importorskip(
    "tinygrad", reason="needs tinygrad, which runs on Python 3.11 and newer: pip install tinygrad"
)
