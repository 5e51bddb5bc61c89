"""The pretraining script, and the solver that it made."""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from selfdistill.prompts.context import ContextRenderer, TeacherContext
from selfdistill.tasks.arithmetic.corpus import Corpus
from selfdistill.tasks.arithmetic.noise import SolverNoise
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer, vocabulary

FOLDER = Path(__file__).parents[3] / "examples" / "arithmetic"
SOLVER = FOLDER / "solver"


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain", FOLDER / "pretrain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def corpus() -> Corpus:
    return Corpus(SolverNoise.draw(seed=0, low=0.05, high=0.6), random.Random(0))


def test_documents_are_laid_out_as_the_trainer_renders_prompts(pretrain: ModuleType) -> None:
    tokenizer = build_tokenizer()
    renderer = ContextRenderer(tokenizer)
    stream = corpus()
    for _ in range(50):
        document = stream.document()
        ids, labels = pretrain.encode(tokenizer, document)
        if document.tag is None or document.context is None:
            prompt = renderer.student_prompt(document.problem)
        else:
            context = TeacherContext(document.tag, document.context)
            prompt = renderer.teacher_prompt(document.problem, context)
        assert ids[: len(prompt)] == prompt
        assert set(labels[: len(prompt)]) == {-100}
        text = " ".join(piece.text for piece in document.target)
        target = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids[len(prompt) :] == [*target, tokenizer.eos_token_id]
        trained = "".join(piece.text for piece in document.target if piece.trained)
        kept = [label for label in labels if label != -100]
        assert "".join(tokenizer.convert_ids_to_tokens(kept)) == (
            "".join(trained.split()) + tokenizer.eos_token
        )


def test_training_lowers_the_loss_and_writes_a_folder(
    pretrain: ModuleType,
    make_model: Callable[..., LlamaForCausalLM],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = build_tokenizer()
    assert pretrain.build_model(tokenizer).num_parameters() >= 2_000_000
    # Training is the same for a smaller one, and some processors only emulate bfloat16.
    model = make_model(seed=0)
    arguments = argparse.Namespace(
        steps=25, documents=6, lr=1e-2, compile=False, save_every=1000, output=tmp_path
    )
    pretrain.train(model, tokenizer, corpus(), arguments)
    shown = capsys.readouterr().out.split()
    assert float(shown[shown.index("loss") + 1]) < 4.0
    pretrain.save(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_shipped_solver_is_small_and_says_how_it_was_made() -> None:
    assert (SOLVER / "model.safetensors").stat().st_size < 15e6
    record = json.loads((SOLVER / "training.json").read_text())
    assert record["command"].startswith("python examples/arithmetic/pretrain.py")
    assert record["parameters"] >= 2_000_000
    measured = record["measured"]
    assert 0.20 <= measured["avg"] <= 0.45
    assert measured["avg_with_critique"] > 0.80
    assert measured["avg_with_reference"] > 0.80


@pytest.mark.slow
def test_shipped_solver_has_its_abilities(pretrain: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SOLVER)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == vocabulary()
    model = AutoModelForCausalLM.from_pretrained(SOLVER, dtype=torch.float32)
    measured = pretrain.measure(model, tokenizer, count=30, samples=4, seed=1)
    assert 0.15 < measured["avg"] < 0.55
    assert measured["avg_with_critique"] > 0.75
    assert measured["avg_with_reference"] > 0.75
