"""The oracle: plain torch that materialises [tokens, vocabulary]."""

from selfdistill_kernels.backends.reference.backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
