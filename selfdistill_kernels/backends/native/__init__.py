"""Library GEMMs around the compiled row kernels of csrc/."""

from selfdistill_kernels.backends.native.backend import NativeBackend

__all__ = ["NativeBackend"]
