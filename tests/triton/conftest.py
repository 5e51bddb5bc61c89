"""The Triton kernels under Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/triton`.

The variable must be set before triton is imported, so these tests have a pytest process of their
own (Makefile). Without it they refuse instead of skipping.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/triton runs under Triton's interpreter, in a process of its own: "
        "TRITON_INTERPRET=1 python -m pytest tests/triton"
    )

import interpreter

np.seterr(all="ignore")  # masked lanes may overflow; numpy says so, hardware does not
interpreter.round_as_hardware_does()
