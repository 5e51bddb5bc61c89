"""Refuses, when it is imported, a TRL that these trainers were not made for."""

from importlib.metadata import version

# They override methods of these trainers that TRL may rename at any time.
TESTED = "1.16."

if not version("trl").startswith(TESTED):
    raise ImportError(
        f"selfdistill_kernels.integrations.trl: made for TRL {TESTED}x, found {version('trl')}; "
        "install trl==1.16.0, or use selfdistill_kernels in a loop of your own"
    )
