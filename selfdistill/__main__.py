"""`python -m selfdistill` is the command line."""

from selfdistill.cli import main

main()
