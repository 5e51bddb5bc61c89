"""The folder that kernel-builder and the hub's loader read: build.toml, torch-ext/, csrc/, a card.

Formats: huggingface.co/docs/kernels, "Write kernels" and "Kernel requirements", edition 5.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from kernel_hub.card import card
from kernel_hub.relocation import PACKAGE, relocate
from kernel_hub.setup_script import ROOT, setup_script

NAME = "selfdistill-kernels"
# 0 says that functions may still change.
VERSION = 0
LICENSE = "Apache-2.0"
# These need packages that a kernel may not have, or a name to be imported by.
LEFT_OUT = ("integrations/", "tools/", "flops.py")
EXTENSION = PurePosixPath("backends/native/extension.py")
# What kernel-builder is called by.
FLAKE = """{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

# The operators lie in the namespace that the builder names its extension by.
FLAGS = ("-O3", "-fvisibility=hidden", "-fopenmp", "-DSELFDISTILL_NAMESPACE=TORCH_EXTENSION_NAME")
COMMON = ("ops", "gemm", "transposed", "widened", "rounding", "memory", "rows_default")


def write_sources(target: Path) -> None:
    """Write everything but build variants into a folder, which is emptied first."""
    shutil.rmtree(target, ignore_errors=True)
    package = target / "torch-ext" / PACKAGE
    for place, source in python_sources():
        (package / place).parent.mkdir(parents=True, exist_ok=True)
        (package / place).write_text(source, encoding="utf-8")
    shutil.copytree(ROOT / "csrc", target / "csrc")
    shutil.copy(ROOT / "LICENSE", target)
    (target / "build.toml").write_text(build_toml(), encoding="utf-8")
    (target / "CARD.md").write_text(card(ROOT / "docs/benchmarks.md", VERSION), encoding="utf-8")
    (target / "flake.nix").write_text(FLAKE, encoding="utf-8")


def python_sources() -> Iterator[tuple[PurePosixPath, str]]:
    """The modules of the kernel, each with its path in the package."""
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        place = PurePosixPath(file.relative_to(ROOT / PACKAGE).as_posix())
        if place.as_posix().startswith(LEFT_OUT):
            continue
        if place == EXTENSION:
            yield place, (Path(__file__).parent / "extension.py.txt").read_text(encoding="utf-8")
        else:
            yield place, relocate(file.read_text(encoding="utf-8"), place)


def build_toml() -> str:
    """build.toml: the bindings, and for each backend the files that share their flags."""
    headers = sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".h", ".inl") and "cuda" not in path.parts
    )
    lines = [
        "[general]",
        *_assignments(name=NAME, version=VERSION, edition=5, license=LICENSE),
        _assignment("backends", ["cpu", "cuda"]),
        "",
        "[torch]",
        _assignment("src", ["csrc/bindings.cpp", "csrc/library.h"]),
        _assignment("include", ["csrc"]),
        _assignment("cxx-flags", FLAGS),
    ]
    for backend in ("cpu", "cuda"):
        groups: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {"common": (COMMON, FLAGS)}
        for stem, flags in setup_script().X86_FLAGS.items():
            groups[stem] = ((stem,), (*FLAGS, *flags.split()))
        for group, (stems, flags) in groups.items():
            files = [f"csrc/cpu/{stem}.cpp" for stem in stems]
            lines += _section(f"{group}_{backend}", backend, [*files, *headers], flags)
    cuda = sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc/cuda").iterdir()
        if path.suffix in (".cpp", ".cu", ".h", ".cuh")
    )
    lines += _section("rows_cuda", "cuda", [*cuda, *headers], FLAGS)
    return "\n".join(lines) + "\n"


def _section(name: str, backend: str, sources: list[str], flags: tuple[str, ...]) -> list[str]:
    return [
        "",
        f"[kernel.{name}]",
        _assignment("backend", backend),
        _assignment("depends", ["torch"]),
        _assignment("include", ["csrc", f"csrc/{'cuda' if name == 'rows_cuda' else 'cpu'}"]),
        _assignment("cxx-flags", flags),
        _assignment("src", sources),
    ]


def _assignments(**values: object) -> Iterator[str]:
    return (_assignment(key, value) for key, value in values.items())


def _assignment(key: str, value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"{key} = [{', '.join(_text(item) for item in value)}]"
    return f"{key} = {_text(value)}"


def _text(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
