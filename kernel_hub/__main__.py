"""Writes the kernel for the hub, and builds its variant for this torch: `make kernel-hub`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kernel_hub.layout import write_sources
from kernel_hub.setup_script import ROOT
from kernel_hub.variant import build_variant


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernel_hub", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "kernel-hub")
    parser.add_argument("--no-variant", action="store_true", help="write sources, compile nothing")
    arguments = parser.parse_args()
    target = arguments.output.resolve()
    write_sources(target)
    print(f"{target}: build.toml, torch-ext/, csrc/, CARD.md")
    if not arguments.no_variant:
        print(build_variant(target, target.parent / f"{target.name}-objects"))


if __name__ == "__main__":
    main()
