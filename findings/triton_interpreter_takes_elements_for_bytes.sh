#!/usr/bin/env bash
# triton 3.5.1 and 3.6.0 (torch 2.13.0, numpy 2.3.5)
#
# One would expect: a tensor descriptor whose rows start on 16-byte boundaries, which is what the
# hardware asks for, is taken by Triton's interpreter as by a compiled kernel.
# Observed: the interpreter of triton 3.5.1 wants the distance of rows to be a multiple of 16 counted
# in elements: it refuses a float32 matrix of 24 columns (96 bytes a row), although the constructor of
# the descriptor has just taken it. triton 3.6.0 counts bytes and reads the right values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
cat > "$folder/read.py" <<'PYTHON'
import platform

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def copy_tile(matrix, out):
    tile = matrix.load([0, 0])
    tl.store(out + tl.arange(0, 8)[:, None] * 16 + tl.arange(0, 16)[None, :], tile)


print("python", platform.python_version(), "| torch", torch.__version__, "| triton", triton.__version__)
values = torch.arange(8 * 24, dtype=torch.float32).reshape(8, 24)
out = torch.zeros(8, 16)
descriptor = TensorDescriptor.from_tensor(values, [8, 16])
print("rows are", values.stride(0) * values.element_size(), "bytes apart")
try:
    copy_tile[(1,)](descriptor, out)
    print("right" if torch.equal(out, values[:, :16]) else "wrong")
except Exception as error:
    print(f"{type(error).__name__}: {error}")
PYTHON
cd "$folder"
run() { # prints what the kernel gave; the argument is triton's version
  install 'torch==2.13.0' 'numpy==2.3.5' "triton==$1"
  TRITON_INTERPRET=1 "$folder/venv/bin/python" read.py | tee /dev/stderr | tail -1
}
changed() { echo "the behaviour has changed: $1" >&2; exit 1; }
[[ $(run 3.5.1) == *"stride must be 16-byte aligned"* ]] || changed 3.5.1
[[ $(run 3.6.0) == right ]] || changed 3.6.0
