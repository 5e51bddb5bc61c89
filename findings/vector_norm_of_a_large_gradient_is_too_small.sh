#!/usr/bin/env bash
# torch 2.13.0 (CPU)
#
# One would expect: the norm of a float32 tensor is right to a few units in the last place, as torch.sum
# of its squares is; clip_grad_norm_ clips by it.
# Observed: torch.linalg.vector_norm adds up the squares of a tensor in a few running float32 sums, so the
# norm becomes too small as the tensor grows: by 0.2 % for the gradient of an lm_head of 49152 x 576 and by
# some percent for 128256 x 2048. torch.nn.utils.clip_grad_norm_ and get_total_norm take that norm for each
# gradient; the norm of the norms of parts of 65,536 elements has seven digits.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'torch==2.13.0'
cd "$folder"
cat > program.py <<'PYTHON'
import platform

import torch

torch.set_num_threads(1)
print("python", platform.python_version(), "| torch", torch.__version__)
print("ATen uses", torch.backends.cpu.get_cpu_capability())
errors = {}
for rows, columns in ((4096, 256), (49152, 576), (128256, 2048)):
    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    true = sum(part.double().square().sum().item() for part in gradient.split(1024)) ** 0.5
    parts = torch.stack([torch.linalg.vector_norm(p) for p in gradient.flatten().split(65536)])
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.data, parameter.grad = gradient, gradient
    found = {
        "vector_norm": torch.linalg.vector_norm(gradient),
        "clip_grad_norm_": torch.nn.utils.clip_grad_norm_([parameter], float("inf")),
        "square().sum().sqrt()": gradient.square().sum().sqrt(),
        "norm of parts": torch.linalg.vector_norm(parts),
    }
    for name, norm in found.items():
        errors[name, rows] = norm.item() / true - 1
        print(f"{rows} x {columns} {name}: relative error {errors[name, rows]:+.1e}")
for name in ("vector_norm", "clip_grad_norm_"):
    assert errors[name, 49152] < -1e-4, "the behaviour has changed"
    assert errors[name, 128256] < -1e-3, "the behaviour has changed"
for name in ("square().sum().sqrt()", "norm of parts"):
    assert abs(errors[name, 128256]) < 1e-5, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" program.py
