"""`benchmarks` is not installed: make it importable under a bare `pytest` too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
