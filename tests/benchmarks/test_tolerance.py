"""States of a model in, a table and a picture of error against time out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_solvers import tiny_llama
from tiny_tokenizers import byte_level

from benchmarks import activations, tolerance


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tiny_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_states_of_a_model_are_measured(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "states.safetensors", tmp_path / "plot.png"
    activations.main([str(chat_model), str(file), "--tokens", "24", "--new-tokens", "4"])
    problem = activations.read_problem(file, torch.float32, "forward_kl")
    assert problem.shape.tokens == 24
    assert not torch.equal(problem.student_hidden, problem.teacher_hidden)
    tolerance.main(["--activations", str(file), "--rounds", "1", "--plot", str(picture)])
    table = capsys.readouterr().out
    assert "states of states.safetensors" in table
    assert all(f"| {name} |" in table for name in ("exact, trained", "0.002, frozen"))
    assert picture.stat().st_size > 1000


def test_more_tokens_than_were_sampled_are_refused(chat_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens: 9999 asked for"):
        activations.main(
            [str(chat_model), str(tmp_path / "x"), "--tokens", "9999", "--new-tokens", "1"]
        )
