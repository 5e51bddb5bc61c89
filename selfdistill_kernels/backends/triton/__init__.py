"""Fused GEMM and statistics for GPUs, in Triton. Import only where triton is installed."""

from selfdistill_kernels.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend"]
