"""Which Tritons "auto" takes, and what it says of another."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import warnings
from dataclasses import replace

import pytest
import torch

from selfdistill_kernels.backends import registry, triton_versions
from selfdistill_kernels.backends.dispatch import Choice, Found, decide
from selfdistill_kernels.backends.triton_versions import (
    TESTED_TRITON,
    installed_triton,
    untested,
)

CUDA = torch.device("cuda")
BFLOAT16 = {"device": "cuda", "dtype": torch.bfloat16}
NEWER = Found(None, None, None, untested_triton=untested("3.99.0"))


@pytest.mark.parametrize(
    "version",
    [*TESTED_TRITON, "3.5.0", "3.6.0.post1", "3.6.0+git5ad4bd3", "3.6.0+rocm7.1", "3.7.0", "3.9.4"],
)
def test_releases_of_a_tested_minor_are_taken(version):
    assert untested(version) is None


@pytest.mark.parametrize(
    "version",
    [
        "3.4.0", "2.3.1", "3.10.0", "4.0.0", "3.55.0", "3.9.0.dev20261101", "3.8.0rc1",
        "3.9.0.dev1+git12ab", "of an unknown version", "3",
    ],
)  # fmt: skip
def test_others_are_named_with_what_was_tested_and_how_to_take_them(version):
    reason = untested(version)
    assert reason.startswith(f"Triton {version} is none of those")
    assert ", ".join(TESTED_TRITON) in reason
    assert "backend='triton'" in reason


def test_auto_passes_it_over_and_whoever_names_it_gets_it():
    choice = decide("auto", **BFLOAT16, found=NEWER)
    assert choice == Choice("native", (("triton", NEWER.untested_triton),))
    assert decide("triton", **BFLOAT16, found=NEWER) == Choice("triton")
    alone = replace(NEWER, cuda_problem="no nvcc")
    assert decide("auto", **BFLOAT16, found=alone).backend == "reference"
    # What cannot run at all is the better reason.
    broken = replace(NEWER, triton_problem="no GPU in this torch")
    assert decide("auto", **BFLOAT16, found=broken).passed_over == (
        ("triton", "no GPU in this torch"),
    )


@pytest.mark.parametrize("cuda_problem", [None, "no nvcc"], ids=["native", "reference"])
def test_whatever_runs_instead_says_so_once(cuda_problem, monkeypatch):
    monkeypatch.setattr(registry, "found_on", lambda _: replace(NEWER, cuda_problem=cuda_problem))
    registry._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            name = registry.choose_backend("auto", device=CUDA, dtype=torch.bfloat16)
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert f"using the {name} backend" in str(warning.message)
    assert "Triton 3.99.0 is none of those" in str(warning.message)
    assert ("materialises" in str(warning.message)) == (name == "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose_backend("triton", device=CUDA, dtype=torch.bfloat16) == "triton"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ('"""isort:skip_file"""\n__version__ = \'3.6.0\'\n', "3.6.0"),
        ('__version__ = "3.9.1+git1"\n', "3.9.1+git1"),
        ("from .version import __version__\n", "of an unknown version"),
    ],
)
def test_the_version_is_that_of_the_package_that_would_be_imported(
    text, version, tmp_path, monkeypatch
):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(text)
    spec = importlib.machinery.PathFinder.find_spec("triton", [str(tmp_path)])
    monkeypatch.setattr(triton_versions.importlib.util, "find_spec", lambda _: spec)
    assert installed_triton() == version
    assert registry._find().untested_triton == untested(version)


def test_no_triton_has_no_version(monkeypatch):
    monkeypatch.setattr(triton_versions.importlib.util, "find_spec", lambda _: None)
    assert installed_triton() is None
    assert registry._find().untested_triton is None


def test_the_installed_one_is_known():
    triton = pytest.importorskip("triton", reason="pip install 'triton>=3.5,<3.10'")
    assert installed_triton() == triton.__version__
