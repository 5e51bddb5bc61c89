#!/usr/bin/env bash
# math-verify 0.9.0 (latex2sympy2_extended 1.11.0, sympy 1.14.0)
#
# One would expect: 1010_2 (in base two) and 1010_3 (in base three) are different numbers.
# Observed: the index of a number is ignored, so every base verifies against every other one, and
# 1010_2 against the decimal number 1010 instead of 10.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    'math-verify[antlr4_13_2]==0.9.0' 'latex2sympy2_extended==1.11.0' 'sympy==1.14.0'
"$folder/venv/bin/python" - <<'PYTHON'
import platform
from importlib.metadata import version

from math_verify import parse, verify

print("python", platform.python_version(), "| math-verify", version("math-verify"))
print("latex2sympy2_extended", version("latex2sympy2_extended"), "| sympy", version("sympy"))

answer = "$1010_2$"
parsed = parse(answer)
print(answer, "reads as", parsed[0])
observed = {}
for gold in ("$1010_3$", "$1010$", "$10$"):
    observed[gold] = verify(parse(gold), parsed)
    print(f"gold {gold:9} verify says {observed[gold]}")

assert observed == {"$1010_3$": True, "$1010$": True, "$10$": False}, "the behaviour has changed"
PYTHON
