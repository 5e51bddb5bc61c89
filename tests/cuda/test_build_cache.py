"""Compiled objects are taken from the cache where, and only where, they are the same objects."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import build_cache
import cuda_build
import pytest
import torch
from build_cache import made_once
from cuda_build import EMULATION, HOST_FLAGS, ROOT, SOURCES, compiler, run


def build(cache: Path, files: list[Path], *settings: str) -> tuple[Path, bool]:
    """The file, and whether it was made now."""
    made = []

    def make(output: Path) -> None:
        made.append(output)
        output.write_text("content")

    path = made_once("object.o", make, files=files, settings=settings, cache=cache)
    assert path.read_text() == "content"
    return path, bool(made)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "a.h", tmp_path / "b.cu"]
    for path in made:
        path.write_text(f"text of {path.name}")
    return made


def test_the_same_is_made_once(files, tmp_path):
    path, fresh = build(tmp_path / "cache", files, "-O1", "gcc 12")
    assert fresh
    assert path.name.endswith("-object.o")
    os.utime(files[0], (0, 0))  # contents count, times do not
    assert build(tmp_path / "cache", files, "-O1", "gcc 12") == (path, False)


def test_whatever_goes_in_changes_the_name(files, tmp_path):
    seen = {build(tmp_path / "cache", files, "-O1", "gcc 12")[0]}
    others = [["-O2", "gcc 12"], ["-O1", "gcc 13"], ["-O1gcc 12"], ["-O1", "gcc 12", ""], []]
    for settings in others:
        path, fresh = build(tmp_path / "cache", files, *settings)
        assert fresh
        seen.add(path)
    files[0].write_text("another text")
    seen.add(build(tmp_path / "cache", files, "-O1", "gcc 12")[0])
    # The same contents under each other's names, and a text that moved from one file to the other.
    texts = [path.read_text() for path in files]
    for changed in (texts[::-1], [texts[0] + texts[1][:1], texts[1][1:]]):
        for path, text in zip(files, changed, strict=True):
            path.write_text(text)
        seen.add(build(tmp_path / "cache", files, "-O1", "gcc 12")[0])
    assert len(seen) == 1 + len(others) + 3


def test_what_fails_is_not_kept(files, tmp_path):
    def fail(output: Path) -> None:
        output.write_text("half of it")
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space left"):
        made_once("object.o", fail, files=files, settings=["-O1"], cache=tmp_path / "cache")
    assert build(tmp_path / "cache", files, "-O1")[1]


def test_two_processes_make_it_once(files, tmp_path):
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from build_cache import made_once\n"
        "folder = Path(sys.argv[1])\n"
        "def make(output):\n"
        "    with (folder / 'log').open('a') as log:\n"
        "        log.write('made ')\n"
        "    time.sleep(0.5)\n"
        "    output.write_text('whole')\n"
        "made = made_once('o', make, files=[folder / 'a.h'], settings=[], cache=folder / 'cache')\n"
        "assert made.read_text() == 'whole'\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(build_cache.__file__).parent)}
    processes = [subprocess.Popen(command, env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made "


def test_what_nobody_used_for_long_is_removed(files, tmp_path):
    old, _ = build(tmp_path / "cache", files, "old")
    used, _ = build(tmp_path / "cache", files, "used")
    weeks_ago = time.time() - 30 * 24 * 3600
    for path in (old, used):
        os.utime(path, (weeks_ago, weeks_ago))
    assert not build(tmp_path / "cache", files, "used")[1]
    assert build(tmp_path / "cache", files, "new")[1]
    assert used.exists()
    assert not old.exists()


def read_by_compiler(source: Path, *flags: str) -> set[Path]:
    """All that the preprocessor opens, but for the headers of the system, torch and Python."""
    from torch.utils.cpp_extension import include_paths

    outside = [*include_paths(), sysconfig.get_path("include")]
    told = run(
        [
            compiler(), *HOST_FLAGS, "-DSELFDISTILL_DEVICE_TYPE=at::kCPU", *flags, "-MM",
            *(f"-isystem{path}" for path in outside), "-x", "c++", str(source),
        ]
    )  # fmt: skip
    return {Path(word).resolve() for word in told.replace("\\\n", " ").split(":", 1)[1].split()}


def test_every_file_and_flag_of_a_build_counts(monkeypatch, tmp_path):
    builds: dict[tuple[str, Path], tuple[Sequence[Path], Sequence[str]]] = {}
    (tmp_path / "made").touch()

    def record(
        name: str, make: object, *, files: Sequence[Path], settings: Sequence[str], cache: Path
    ) -> Path:
        builds[Path(name).suffix, files[0]] = files, settings
        return tmp_path / "made"

    run_really = cuda_build.run
    monkeypatch.setattr(cuda_build, "made_once", record)
    monkeypatch.setattr(
        cuda_build, "run", lambda command: run_really(command) if "--version" in command else ""
    )
    cuda_build.build_driver(tmp_path, ("-O1", "-fsanitize=address"))
    cuda_build.build_emulated_operators(tmp_path)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0\n")
    nvcc.chmod(0o755)
    for source in SOURCES:
        cuda_build.compile_for_gpus(nvcc, source, [90, 120])

    operators, driver = ROOT / "csrc/cuda/ops.cpp", ROOT / "tests/cuda/driver.cpp"
    assert builds.keys() == {
        *((".o", source) for source in (*SOURCES, operators, driver)),
        *((".txt", source) for source in SOURCES),
    }
    emulated = ["-include", str(EMULATION), f"-I{ROOT / 'tests/cuda/include'}"]
    for (kind, source), (files, settings) in builds.items():
        read = read_by_compiler(source, *emulated)
        assert source in read
        assert ROOT / "csrc/problem.h" in read
        if kind == ".txt":
            read = {path for path in read if ROOT / "csrc" in path.parents}
            assert "-gencode=arch=compute_120,code=sm_120" in settings
            assert any("release 13.0" in setting for setting in settings)
        assert read <= set(files)
        assert run_really([compiler(), "--version"]) in settings[-1]
    assert "-fsanitize=address" in builds[".o", driver][1]
    assert Path(torch.version.__file__) in builds[".o", operators][0]
