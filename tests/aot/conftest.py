"""Compiles for real GPUs on any machine; needs Triton's compiler, not its interpreter."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/aot compiles kernels; unset TRITON_INTERPRET")
