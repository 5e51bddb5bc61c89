"""Builds the variant of the kernel for this machine's torch, for CPUs.

kernel-builder makes all variants, in environments of its own; this one is what a test can load here
(kernels.get_local_kernel), and what shows that the fast path works under another name.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from setuptools import Distribution

from kernel_hub.layout import LICENSE, NAME, VERSION
from kernel_hub.relocation import PACKAGE
from kernel_hub.setup_script import setup_script

OPERATORS = """from __future__ import annotations

import torch

from . import {name}  # noqa: F401  registers the operators

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""


def variant_name() -> str:
    """What the hub's loader calls builds for this torch, processor and system."""
    major, minor = torch.__version__.split(".")[:2]
    system = platform.system().lower()
    return f"torch{major}{minor}-cxx11-cpu-{platform.machine()}-{system}"


def build_variant(target: Path, objects: Path) -> Path:
    """Compile target/csrc and put the kernel into target/build.

    Args:
        target: what `layout.write_sources` has written.
        objects: a folder for the compiler's files.

    Returns:
        The folder of the variant.

    Raises:
        SystemExit: the compiler failed (setup.py says how).
    """
    name = f"_{PACKAGE}_cpu_{_digest_of_sources(target)}"
    variant = target / "build" / variant_name()
    shutil.copytree(target / "torch-ext" / PACKAGE, variant)
    shutil.copy(_compile(name, target, objects), variant)
    (variant / "_ops.py").write_text(OPERATORS.format(name=name), encoding="utf-8")
    metadata = {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": _digests(variant)},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return variant


def _compile(name: str, target: Path, objects: Path) -> Path:
    """The extension under its name in the hub, built by setup.py's own command."""
    here = Path.cwd()
    os.chdir(target)  # setup.py names its sources relative to the working directory
    try:
        extensions, commands = setup_script().native_extensions()
        extension = extensions[0]
        extension.name = name
        extension.define_macros.append(("SELFDISTILL_NAMESPACE", "TORCH_EXTENSION_NAME"))
        extension.depends.remove("setup.py")  # is not here
        command = commands["build_ext"](Distribution({"ext_modules": [extension]}))
        command.build_lib = str(objects / name / "lib")
        command.build_temp = str(objects / name)
        command.ensure_finalized()
        command.run()
        return Path(command.get_ext_fullpath(name))
    finally:
        os.chdir(here)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _digest_of_sources(target: Path) -> str:
    """Eight hexadecimal digits: other sources have another name, and other operators."""
    digest = hashlib.sha256()
    for folder in ("csrc", "torch-ext"):
        for path in _files(target / folder):
            digest.update(f"{path.relative_to(target)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _digests(variant: Path) -> dict[str, str]:
    """The SHA-256 of every file, in base64."""
    return {
        path.relative_to(variant).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in _files(variant)
    }
