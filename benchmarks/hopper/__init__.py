"""A sweep with specialised warps for Hopper GPUs, which nobody has measured: docs/gpu-design.md.

kernel.py is the kernel in Triton's Gluon, sweep.py checks what it can take and launches it. Nothing
in the packages uses it; `python -m benchmarks.gpu` runs it where a Hopper GPU is at hand.
"""
