"""What is read of this machine's caches, and what stands for them where nothing is."""

from __future__ import annotations

import os

import pytest

from selfdistill_kernels.backends.native import caches
from selfdistill_kernels.backends.native.caches import (
    ASSUMED,
    Caches,
    machine_caches,
    read_sysconf,
    read_sysfs,
)


def write_cache(directory, index: int, level: str, kind: str, size: str) -> None:
    entry = directory / f"index{index}"
    entry.mkdir()
    for name, text in (("level", level), ("type", kind), ("size", size)):
        (entry / name).write_text(text + "\n")


def test_the_highest_level_of_sysfs(tmp_path):
    write_cache(tmp_path, 0, "1", "Data", "48K")
    write_cache(tmp_path, 1, "1", "Instruction", "32K")
    write_cache(tmp_path, 2, "2", "Unified", "2048K")
    assert read_sysfs(tmp_path) == Caches(2 << 20, "sysfs")
    write_cache(tmp_path, 3, "3", "Unified", "36M")
    assert read_sysfs(tmp_path) == Caches(36 << 20, "sysfs")
    assert read_sysfs(tmp_path).describe() == "36 MiB last-level cache (sysfs)"


def test_what_sysfs_does_not_say_is_left_out(tmp_path):
    assert read_sysfs(tmp_path) is None
    write_cache(tmp_path, 0, "2", "Unified", "2048K")
    write_cache(tmp_path, 1, "3", "Unified", "much")
    (tmp_path / "index2").mkdir()
    assert read_sysfs(tmp_path) == Caches(2 << 20, "sysfs")


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"SC_LEVEL3_CACHE_SIZE": 32 << 20, "SC_LEVEL2_CACHE_SIZE": 1 << 20}, 32 << 20),
        ({"SC_LEVEL3_CACHE_SIZE": 0, "SC_LEVEL2_CACHE_SIZE": 1 << 20}, 1 << 20),
        ({"SC_LEVEL3_CACHE_SIZE": -1, "SC_LEVEL2_CACHE_SIZE": 0}, None),
        ({}, None),  # a C library that does not know the names
    ],
)
def test_sysconf(monkeypatch, answers, expected):
    def sysconf(name):
        if name not in answers:
            raise ValueError("unrecognized configuration name")
        return answers[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert read_sysconf() == (None if expected is None else Caches(expected, "sysconf"))


def test_something_is_assumed_where_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(caches, "CPU0", tmp_path / "none")
    monkeypatch.setattr(caches, "read_sysconf", lambda: None)
    machine_caches.cache_clear()
    assert machine_caches() == ASSUMED
    machine_caches.cache_clear()
    assert machine_caches().last > 0
