#!/usr/bin/env bash
# math-verify 0.9.0 (latex2sympy2_extended 1.11.0, sympy 1.14.0)
#
# One would expect: "1\,234" is 1234 (LaTeX's usual space between groups of digits), and the mixed
# number "2 1/2" is 5/2.
# Observed: numbers side by side are added. "1\,234" is 235, so it verifies against 235 and not
# against 1234; "2 1/2" is (2 + 1)/2, so it verifies against 1.5 and not against 2.5.
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

observed = {}
for gold, answer in [("235", r"1\,234"), ("1234", r"1\,234"), ("1.5", "2 1/2"), ("2.5", "2 1/2")]:
    parsed = parse(f"${answer}$")
    observed[gold, answer] = verify(parse(f"${gold}$"), parsed)
    print(f"gold {gold:5} answer {answer:7} reads as {parsed[0]}:", observed[gold, answer])

assert observed == {
    ("235", r"1\,234"): True,
    ("1234", r"1\,234"): False,
    ("1.5", "2 1/2"): True,
    ("2.5", "2 1/2"): False,
}, "the behaviour has changed"
PYTHON
