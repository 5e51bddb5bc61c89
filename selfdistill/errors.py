"""The base of every error that the person at the command line can mend."""

from __future__ import annotations


class UserError(Exception):
    """A setting, a file, a machine or a run is not as it must be; the message says what to do.

    The command line ends with the message of one, and shows no traceback. Errors of the program
    itself are Python's own.
    """
