#!/usr/bin/env bash
# math-verify 0.9.0 (latex2sympy2_extended 1.11.0, sympy 1.14.0)
#
# One would expect: "0.\overline{3}" is 1/3, or cannot be read.
# Observed: everything after the point is dropped without a word: it reads as 0, so it verifies
# against 0 and against 0.\overline{7}, and not against \frac{1}{3}.
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

answer = r"$0.\overline{3}$"
parsed = parse(answer)
print(answer, "reads as", parsed[0])
observed = {}
for gold in (r"$\frac{1}{3}$", "$0$", r"$0.\overline{7}$"):
    observed[gold] = verify(parse(gold), parsed)
    print(f"gold {gold:18} verify says {observed[gold]}")

assert observed == {
    r"$\frac{1}{3}$": False,
    "$0$": True,
    r"$0.\overline{7}$": True,
}, "the behaviour has changed"
PYTHON
