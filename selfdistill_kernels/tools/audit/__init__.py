"""Compiles every Triton kernel for real GPUs, on a machine without one, and judges the result.

python -m selfdistill_kernels.tools.audit    table, JSON, exit status 1 when a kernel is refused

record.py collects what the host code would launch, build.py compiles it, judgement.py says what is
refused and why.
"""
