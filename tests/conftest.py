"""tests/triton needs a process of its own (see its conftest and the Makefile)."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton"]
