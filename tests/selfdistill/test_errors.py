"""Every error that a person can mend is a `UserError`, which the command line ends with."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import pytest

import selfdistill
from selfdistill import cli
from selfdistill.errors import UserError

# Caught where they are raised: nobody outside sees them.
INNER = {"CritiqueError", "YAMLTextError"}


def error_classes() -> dict[str, type]:
    found = {}
    for module in pkgutil.walk_packages(selfdistill.__path__, "selfdistill."):
        if module.name.endswith(("__main__", "vllm_engine")):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            own = isinstance(value, type) and value.__module__.startswith("selfdistill.")
            if own and issubclass(value, Exception):
                found[name] = value
    return found


def test_every_error_of_the_package_is_a_user_error() -> None:
    others = {name for name, c in error_classes().items() if not issubclass(c, UserError)}
    assert {name for name in others if not name.startswith("_")} == INNER


@pytest.mark.parametrize("error", [UserError("mend this"), FileNotFoundError("mend this")])
def test_the_command_line_shows_one_line_and_no_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["selfdistill"])
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == "error: mend this\n"
