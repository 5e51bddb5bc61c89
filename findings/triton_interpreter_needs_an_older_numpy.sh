#!/usr/bin/env bash
# triton 3.6.0 and 3.8.0 with numpy 2.4.6 and 2.3.5 (torch 2.13.0)
#
# One would expect: Triton's interpreter (TRITON_INTERPRET=1) runs a kernel with any numpy that pip
# puts beside it; the package asks for none and bounds none.
# Observed: under triton 3.6.0, which torch 2.10 and 2.11 bring, a kernel with a loop over a range
# that is known at run time fails with numpy 2.4.6 and gives the right sum with 2.3.5: the
# interpreter turns an array of one element into a Python number, which numpy refuses from 2.4 on.
# triton 3.8.0 takes both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
cat > "$folder/total.py" <<'PYTHON'
import platform

import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def total(values, out, count, SIZE: tl.constexpr):
    found = tl.zeros((SIZE,), tl.float32)
    for start in range(0, count, SIZE):
        offsets = start + tl.arange(0, SIZE)
        found += tl.load(values + offsets, mask=offsets < count, other=0.0)
    tl.store(out, tl.sum(found, 0))


print(
    "python", platform.python_version(), "| torch", torch.__version__,
    "| triton", triton.__version__, "| numpy", numpy.__version__,
)
values, out = torch.arange(40.0), torch.zeros(1)
try:
    total[(1,)](values, out, 40, SIZE=16)
    found = str(out.item())
except Exception as error:
    found = f"{type(error).__name__}: {error}"
print(found)
PYTHON
cd "$folder"
run() { # prints what the kernel gave; the arguments are packages
  install 'torch==2.13.0' "$@"
  TRITON_INTERPRET=1 "$folder/venv/bin/python" total.py | tee /dev/stderr | tail -1
}
changed() { echo "the behaviour has changed: $1" >&2; exit 1; }
[[ $(run 'triton==3.6.0' 'numpy==2.4.6') == *"only 0-dimensional arrays"* ]] || changed "3.6.0, 2.4.6"
[[ $(run 'triton==3.6.0' 'numpy==2.3.5') == 780.0 ]] || changed "3.6.0, 2.3.5"
[[ $(run 'triton==3.8.0' 'numpy==2.4.6') == 780.0 ]] || changed "3.8.0, 2.4.6"
