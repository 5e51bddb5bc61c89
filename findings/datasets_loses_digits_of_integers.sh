#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1)
#
# One would expect: load_dataset("json") gives the integers of a JSON file back, or says that it
# cannot.
# Observed: one decimal number, or one integer beyond 64 bits, anywhere in the column turns all of
# it into float64: 9007199254740993 comes back as 9007199254740992.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1'
cd "$folder"
HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import json
import platform
from importlib.metadata import version

import datasets

print("python", platform.python_version(), "| datasets", datasets.__version__)
print("pyarrow", version("pyarrow"))
datasets.disable_progress_bars()


def loaded(name, answers):
    with open(name, "w") as file:
        file.writelines(json.dumps({"answer": answer}) + "\n" for answer in answers)
    data = datasets.load_dataset("json", data_files=name, split="train")
    print(answers, "->", list(data["answer"]), data.features["answer"])
    return list(data["answer"])


large = 2**53 + 1
alone = loaded("integers.jsonl", [large, 7])
beside_a_decimal = loaded("decimal.jsonl", [large, 0.5])
beside_a_larger_one = loaded("larger.jsonl", [large, 2**70])

assert alone == [large, 7], "the behaviour has changed"
for column in (beside_a_decimal, beside_a_larger_one):
    assert isinstance(column[0], float), "the behaviour has changed"
    assert int(column[0]) == large - 1, "the behaviour has changed"
PYTHON
