"""The base of every error that the person at the command line can mend."""

from __future__ import annotations


class UserError(Exception):
    """A setting, a file, a machine or a run is not as it must be; the message says what to do.

    The command line prints the message and ends without a traceback. Errors of the program itself
    are Python's own.
    """
