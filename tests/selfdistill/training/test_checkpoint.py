from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from selfdistill.model.weights import TrainedWeights
from selfdistill.training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    TrainState,
    fingerprint,
)

ModelFactory = Callable[..., LlamaForCausalLM]
CONFIG = {"model": "m", "seed": 1, "steps": 9}


class Saved:
    """A store with one checkpoint of a model that has taken a step."""

    def __init__(self, folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.weights = TrainedWeights(model)
        self.base = fingerprint(model)
        self.store = CheckpointStore(folder / "checkpoints")
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.state = TrainState(1, 1, 1, 0.5, CONFIG, self.base)
        self.learn()
        self.store.save(self.state, self.weights, tokenizer, self.optimizer)

    def learn(self) -> None:
        self.model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def load(self, model: LlamaForCausalLM, path: Path | None = None) -> TrainState:
        return self.store.load(
            path or self.store.last,
            weights=TrainedWeights(model),
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
            config=CONFIG,
            base_sha256=self.base,
        )


@pytest.fixture
def saved(tmp_path: Path, make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase) -> Saved:
    return Saved(tmp_path, make_model(), tokenizer)


def test_everything_comes_back(saved: Saved, make_model: ModelFactory) -> None:
    expected_draw = torch.rand(3)
    saved.store.save(saved.state, saved.weights, saved.tokenizer, saved.optimizer)
    torch.manual_seed(99)
    model = make_model(seed=7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    state = saved.store.load(
        saved.store.last,
        weights=TrainedWeights(model),
        optimizer=optimizer,
        config=CONFIG,
        base_sha256=saved.base,
    )
    assert state == saved.state
    assert fingerprint(model) == fingerprint(saved.model) != saved.base
    assert optimizer.param_groups[0]["lr"] == 1e-2
    old, new = saved.optimizer.state_dict()["state"], optimizer.state_dict()["state"]
    assert old.keys() == new.keys()
    for index in old:
        for name in old[index]:
            assert torch.equal(old[index][name], new[index][name])
    assert not torch.equal(torch.rand(3), expected_draw)  # the state saved is the one after it


def test_random_numbers_continue(saved: Saved, make_model: ModelFactory) -> None:
    saved.store.save(saved.state, saved.weights, saved.tokenizer, saved.optimizer)
    expected = torch.rand(3)
    torch.manual_seed(99)
    saved.load(make_model())
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_is_a_transformers_folder(saved: Saved) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved.store.best)
    assert fingerprint(loaded) == fingerprint(saved.model)


def test_only_last_and_best_are_kept(saved: Saved) -> None:
    for step in (2, 3):
        state = replace(saved.state, step=step)
        saved.store.save(state, saved.weights, saved.tokenizer, saved.optimizer)
    assert saved.store.last.resolve().name == "step-000003"
    assert saved.store.best.resolve().name == "step-000001"
    names = sorted(path.name for path in saved.store.directory.iterdir())
    assert names == ["best", "last", "step-000001", "step-000003"]


@pytest.mark.parametrize("keep", [1, 3, 4, 5])
def test_the_newest_are_kept_beside_the_best(saved: Saved, keep: int) -> None:
    store = CheckpointStore(saved.store.directory, keep=keep)
    for step in range(2, 10):
        state = replace(saved.state, step=step)
        store.save(state, saved.weights, saved.tokenizer, saved.optimizer)
        newest = range(max(2, step - keep + 1), step + 1)
        assert store.saved() == [f"step-{each:06d}" for each in (1, *newest)]


def test_a_write_that_fails_leaves_the_last_one(
    saved: Saved, make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfdistill.training.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match=r"step-000002.*No space left.*intact"):
        saved.store.save(
            replace(saved.state, step=2), saved.weights, saved.tokenizer, saved.optimizer
        )
    assert saved.load(make_model()).step == 1
    assert not list(saved.store.directory.glob(".writing*"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
        (lambda p: cut(p / "model.safetensors"), "model.safetensors has other bytes"),
        (lambda p: cut(p / "state.json"), "is torn: state.json"),
        (lambda p: (p / "state.json").unlink(), "not a checkpoint: it has no state.json"),
        (lambda p: (p / "state.json").write_text("{}"), "not a checkpoint of selfdistill"),
        (lambda p: shutil.rmtree(p), "there is no checkpoint at"),
    ],
)
def test_a_torn_checkpoint_is_refused_by_name(
    saved: Saved, make_model: ModelFactory, damage: Callable[[Path], object], message: str
) -> None:
    damage(saved.store.last.resolve())
    with pytest.raises(CheckpointError, match=f"last.*{message}|{message}.*last"):
        saved.load(make_model())


def test_another_version_is_refused(saved: Saved, make_model: ModelFactory) -> None:
    path = saved.store.last / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(CheckpointError, match="version 99"):
        saved.load(make_model())


def test_a_foreign_checkpoint_is_refused(
    saved: Saved, make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model()
    common = {"weights": TrainedWeights(model), "optimizer": torch.optim.AdamW(model.parameters())}
    with pytest.raises(CheckpointError, match=r"another configuration: seed \(1 there, 2 here\)"):
        saved.store.load(
            saved.store.last, **common, config={**CONFIG, "seed": 2}, base_sha256=saved.base
        )
    with pytest.raises(CheckpointError, match="other weights"):
        saved.store.load(saved.store.last, **common, config=CONFIG, base_sha256="0")
    smaller = LlamaForCausalLM(type(model.config)(**{**model.config.to_dict(), "vocab_size": 60}))
    with pytest.raises(CheckpointError, match=r"another model: model\.embed_tokens\.weight"):
        saved.load(smaller)
    state = saved.store.load(
        saved.store.last,
        **common,
        config={**CONFIG, "steps": 12},
        base_sha256=saved.base,
        may_differ=["steps"],
    )
    assert state.step == 1
