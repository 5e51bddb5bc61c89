"""state.json files that this program did not write."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_solvers import tiny_llama
from torch import nn

from selfdistill.model.weights import TrainedWeights
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.training.checkpoint import CheckpointStore, TrainState, fingerprint
from selfdistill.training.state_file import CheckpointError, read_checkpoint, sha256_of

TORN = r"is torn: state\.json cannot be read \("
Change = Callable[[dict[str, Any]], object]


class Saved:
    """A model that has taken a step, and its checkpoint."""

    def __init__(self, folder: Path) -> None:
        tokenizer = build_tokenizer()
        self.model = tiny_llama(tokenizer)
        self.store = CheckpointStore(folder)
        self.base = fingerprint(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.tensor([[1, 2]])).logits.mean().backward()
        self.optimizer.step()
        state = TrainState(1, 1, 1, 0.5, {}, self.base)
        self.store.save(state, TrainedWeights(self.model), tokenizer, self.optimizer)

    def load(self) -> None:
        self.store.load(
            self.store.last,
            weights=TrainedWeights(self.model),
            optimizer=self.optimizer,
            config={},
            base_sha256=self.base,
        )

    def write(self, document: Any) -> None:
        (self.store.last / "state.json").write_text(json.dumps(document))

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.store.last / "state.json").read_text())
        return found

    def replace(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Replace a file, digest and all."""
        save_file(tensors, self.store.last / name)
        document = self.document()
        document["sha256"][name] = sha256_of(self.store.last / name)
        self.write(document)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "not a checkpoint of selfdistill"),
        (b"7", "not a checkpoint of selfdistill"),
        (b'{"epoch": 3, "global_step": 20}', "not a checkpoint of selfdistill"),
        (b"[" * 100_000, TORN + r"it is nested too deeply\). Take another"),
        (
            b'{"format": ' + b"9" * 5000 + b"}",
            TORN + r"it holds a number of thousands of digits\). Take another checkpoint$",
        ),
        ('{"format": "\xe9"}'.encode("latin-1"), TORN + "its byte 12 is 0xe9, which is no UTF-8"),
        ('{"format": 1}'.encode("utf-16"), TORN + "its byte 0 is 0xff, which is no UTF-8"),
        (b"", TORN + "Expecting value"),
    ],
    ids=["list", "number", "trainer", "deep", "digits", "latin-1", "utf-16", "empty"],
)
def test_what_is_no_document(saved: Saved, text: bytes, message: str) -> None:
    (saved.store.last / "state.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        saved.load()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda d: d.update(version="2"), "has version '2'"),
        (lambda d: d.update(version=True), "has version True|version: "),
        (lambda d: d.update(version="9" * 1000), "has version"),
        (lambda d: d.pop("sha256"), "sha256: Field required"),
        (lambda d: d.update(sha256=["a"]), "sha256: "),
        (lambda d: d["sha256"].update({"../../secret": "0"}), "sha256.*: .*pattern"),
        (lambda d: d["sha256"].update({"model.safetensors": 7}), r"sha256\.model\.safetensors: "),
        (lambda d: d["sha256"].pop("optimizer.safetensors"), "digest of optimizer.safetensors"),
        (lambda d: d["sha256"].pop("rng.safetensors"), "digest of rng.safetensors"),
        (lambda d: d.pop("step"), "step: Field required"),
        (lambda d: d.update(step="1"), "step: .*got '1'"),
        (lambda d: d.update(step=-1), "step: .*got -1"),
        (lambda d: d.update(step=True), "step: .*got True"),
        (lambda d: d.update(best_metric="good"), "best_metric: .*got 'good'"),
        (lambda d: d.update(config=[1]), "config: "),
        (lambda d: d.update(config=None), "config: "),
        (lambda d: d.update(base_sha256=None), "base_sha256: "),
        (lambda d: d.update(inputs="none"), "inputs: "),
        (lambda d: d.update(optimizer_groups={}), "optimizer_groups: "),
        (lambda d: d.update(optimizer_groups=[7]), r"optimizer_groups\.0: "),
        (lambda d: d.update(optimizer_groups=[]), "is of another optimiser"),
        (lambda d: d.update(optimizer_groups=[{}]), "is of another optimiser"),
        (lambda d: d.update(optimizer_groups=[{"params": [0]}]), "is of another optimiser"),
    ],
)
def test_what_says_something_else(saved: Saved, change: Change, where: str) -> None:
    document = saved.document()
    change(document)
    saved.write(document)
    with pytest.raises(CheckpointError, match=where) as caught:
        saved.load()
    assert str(saved.store.last) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(saved.store.last))


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.ones(2)},
        {"9999.exp_avg": torch.ones(2)},
        {"x.y": torch.ones(2)},
        {"0.exp_avg": torch.ones(2)},
    ],
    ids=lambda tensors: next(iter(tensors)),
)
def test_the_state_of_another_optimiser(saved: Saved, tensors: dict[str, torch.Tensor]) -> None:
    saved.replace("optimizer.safetensors", tensors)
    with pytest.raises(CheckpointError, match="is of another optimiser"):
        saved.load()


@pytest.mark.parametrize("tensors", [{"other": torch.ones(2)}, {"cpu": torch.ones(2)}])
def test_another_random_state(saved: Saved, tensors: dict[str, torch.Tensor]) -> None:
    saved.replace("rng.safetensors", tensors)
    with pytest.raises(CheckpointError, match="is of another optimiser or random generator"):
        saved.load()


def test_a_file_that_is_no_safetensors(saved: Saved) -> None:
    name = "optimizer.safetensors"
    (saved.store.last / name).write_bytes(b"x" * 100)
    document = saved.document()
    document["sha256"][name] = sha256_of(saved.store.last / name)
    saved.write(document)
    with pytest.raises(CheckpointError, match="is of another optimiser"):
        saved.load()


def test_what_was_written_is_read(saved: Saved) -> None:
    saved.load()
    state = read_checkpoint(saved.store.last)
    assert (state.step, state.best_metric) == (1, 0.5)
    assert re.fullmatch("[0-9a-f]{64}", state.sha256["model.safetensors"])
    assert load_file(saved.store.last / "optimizer.safetensors")
    assert isinstance(saved.model, nn.Module)
