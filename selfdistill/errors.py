"""How commands end: errors that the person at the command line can mend, and interruptions."""

from __future__ import annotations

# The status of a command that Ctrl-C ended, as shells have it.
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A setting, a file, a machine or a run is not as it must be; the message says what to do.

    The command line prints the message and ends without a traceback. Errors of the program itself
    are Python's own.
    """
