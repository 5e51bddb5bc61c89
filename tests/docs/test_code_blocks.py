"""Every code block of README and docs runs, or is at least a command that exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib import util
from pathlib import Path

import page_blocks
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from page_blocks import PAGES, ROOT, blocks

from selfdistill.cli import app
from selfdistill.config import Config

LANGUAGES = {"python", "sh", "text", "yaml"}
COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for block in blocks(page)
        if block.language == "sh"
        for line in block.text.splitlines()
        if line.strip()
    }
)


def pages_with(language: str) -> list[str]:
    found = (page for page in PAGES if any(b.language == language for b in blocks(page)))
    return [page.relative_to(ROOT).as_posix() for page in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_blocks_say_their_language(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page}:{block.line}"


def test_pages_with_python_are_known() -> None:
    assert pages_with("python") == sorted([*page_blocks.GIVEN, *page_blocks.FOLLOWED])


@pytest.mark.parametrize("page", sorted(page_blocks.GIVEN))
def test_python_runs(page: str) -> None:
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1", "CI": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, page_blocks.__file__, page],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_settings_are_settings(page: str) -> None:
    for block in blocks(ROOT / page):
        if block.language == "yaml":
            settings = {"model": "m", "output_dir": "o", "method": {"name": "grpo"}}
            Config.model_validate({**settings, **yaml.safe_load(block.text)})


@cache
def help_of(*command: str) -> str:
    """What a command says of itself."""
    done = subprocess.run(
        [*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def check_options(line: str, known: str) -> None:
    """Every option that a line or its comment names is one of those known."""
    for option in re.findall(r"(?<!\S)--[a-z][\w-]*", line):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), f"{line}: no {option}"


def check_pip(arguments: list[str]) -> None:
    """What is installed is a requirement, or this folder with extras that it has."""
    extras = (ROOT / "pyproject.toml").read_text()
    for argument in arguments:
        if argument.startswith("."):
            for extra in re.findall(r"[\w-]+", argument):
                assert re.search(rf"^{extra} = \[", extras, flags=re.MULTILINE), extra
        elif not argument.startswith("-"):
            Requirement(argument)


@pytest.mark.slow  # asks each program for its help
@pytest.mark.parametrize("line", COMMANDS)
def test_command_exists(line: str) -> None:
    words = shlex.split(line, comments=True)
    match words:
        case ["make", *targets]:
            rules = (ROOT / "Makefile").read_text()
            for target in targets:
                name, is_variable, _ = target.partition("=")
                pattern = rf"\$\({name}\)" if is_variable else rf"^{name}\b.*:"
                assert re.search(pattern, rules, flags=re.MULTILINE), target
        case ["pip", "install", *arguments]:
            check_pip(arguments)
        case ["selfdistill", name, *arguments]:
            command = typer.main.get_command(app).commands[name]
            command.make_context(name, list(arguments))
            options = [option for parameter in command.params for option in parameter.opts]
            check_options(line, " ".join(options))
        case ["python", "-m", module, *_]:
            assert util.find_spec(module) is not None, module
            check_options(line, help_of(sys.executable, "-m", module))
        case ["torchrun", *_]:
            check_options(line, help_of(sys.executable, "-m", "torch.distributed.run"))
        case ["pytest", folder, *_]:
            assert (ROOT / folder).exists()
            check_options(line, help_of(sys.executable, "-m", "pytest"))
        case _:
            pytest.fail(f"{line}: no rule checks this command; add one")
