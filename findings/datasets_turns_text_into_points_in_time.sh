#!/usr/bin/env bash
# datasets 5.2.0 (pyarrow 26.0.1)
#
# One would expect: load_dataset("json") gives the strings of a JSON file back.
# Observed: a column in which every string looks like a date comes back as datetime objects, so
# that "2020-01-01" and "2020-01-01 00:00:00" cannot be told apart; one other string in the column
# is enough to get all of them as text.
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


dates = loaded("dates.jsonl", ["2020-01-01", "2020-01-01 00:00:00"])
mixed = loaded("mixed.jsonl", ["2020-01-01", "2020-01-01 00:00:00", "never"])

assert [type(value).__name__ for value in dates] == ["datetime"] * 2, "the behaviour has changed"
assert dates[0] == dates[1], "the behaviour has changed"
assert mixed == ["2020-01-01", "2020-01-01 00:00:00", "never"], "the behaviour has changed"
PYTHON
