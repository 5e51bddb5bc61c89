#!/usr/bin/env bash
# torch 2.13.0 (CPU), on a processor with AVX-512
#
# One would expect: code that torch.compile made for AVX-512 is not mixed with code for AVX2, since
# the instruction set is part of what its cache is looked up by.
# Observed: ATEN_CPU_CAPABILITY=avx2 makes a process compile for AVX2. In a fresh cache folder it
# gives the numbers of eager torch. In a folder that a process without the variable has used before,
# the same program gives other numbers, without a word (NaN among them). So processes with different
# instruction sets want cache folders of their own (TORCHINDUCTOR_CACHE_DIR).
set -euo pipefail
grep -q avx512bw /proc/cpuinfo || { echo "needs a processor with AVX-512" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0' 'setuptools==82.0.1'
cat > "$folder/program.py" <<'PYTHON'
import platform

import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa


def mean(values, mask):
    weights = mask.to(torch.float32)
    weights = weights / weights.sum().clamp(min=1)
    chosen = torch.where(mask[:, None], values, 0.0)
    return (torch.tanh(values) * weights[:, None]).sum(), chosen.sum(dim=0)


torch.manual_seed(0)
values, mask = torch.randn(13, 37), torch.rand(13) > 0.3
eager = mean(values, mask)
compiled = torch.compile(mean, fullgraph=True)(values, mask)
right = all(torch.allclose(a, b, atol=1e-4) for a, b in zip(eager, compiled))
print("python", platform.python_version(), "| torch", torch.__version__, "|", pick_vec_isa())
print("right" if right else "wrong")
PYTHON
cd "$folder"
run() { # prints right or wrong; the arguments are a cache folder and environment variables
  env "TORCHINDUCTOR_CACHE_DIR=$folder/$1" OMP_NUM_THREADS=1 "${@:2}" "$folder/venv/bin/python" program.py \
    | tee /dev/stderr | tail -1
}
changed() { echo "the behaviour has changed: $1" >&2; exit 1; }
[[ $(run fresh ATEN_CPU_CAPABILITY=avx2) == right ]] || changed "AVX2, cache of its own"
[[ $(run shared) == right ]] || changed "AVX-512"
[[ $(run shared ATEN_CPU_CAPABILITY=avx2) == wrong ]] || changed "AVX2 after AVX-512"
