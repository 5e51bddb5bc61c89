from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import yaml
from tiny_runs import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdistill.config import Config
from selfdistill.export import ExportError, card, export, push
from selfdistill.places import PlaceTakenError
from selfdistill.training.loop import train
from selfdistill.training.solver import load_checkpoint
from selfdistill.training.state_file import StateFile


def trained(solver_dir: Path, run: Path, **changes: Any) -> Config:
    settings = {
        "steps": 1,
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "evaluation": {"every": 1, "problems": 2, "samples": 1},
    }
    config = tiny_config(solver_dir, run, **settings | changes)
    train(config)
    return config


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(torch.tensor([[1, 4, 9, 10, 5]])).logits
    return result


def test_a_merged_model_is_the_trained_one(solver_dir: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "out"
    config = trained(solver_dir, run, adapter={"r": 4, "alpha": 64})
    export(run, output, checkpoint="last")
    expected = logits(load_checkpoint(config, run / "checkpoints" / "last"))
    model = AutoModelForCausalLM.from_pretrained(output)
    # Merging rounds each weight once.
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    base = logits(AutoModelForCausalLM.from_pretrained(solver_dir))
    assert (expected - base).abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(solver_dir).chat_template
    card = (output / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "Weights after step 1 of 1" in card
    assert str(run) not in card
    with pytest.raises(PlaceTakenError, match="is not empty"):
        export(run, output)
    export(run, tmp_path / "half", checkpoint="last", dtype="bfloat16")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16


def test_a_card_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    settings: dict[str, Any] = {
        "output_dir": tmp_path / "run",
        "method": {"name": "grpo"},
        "task": {"name": "jsonl", "splits": {"all": str(tmp_path / "rows.jsonl")}},
        "rollout": {"stop": ["/a/b", "/"]},
    }
    state = StateFile.model_construct(step=1, best_step=None, best_metric=None)
    for model, named in ((str(tmp_path / "base"), None), ("owner/base", "owner/base")):
        config = Config.model_validate({"model": model, **settings})
        page = card(config, state, form="merged")
        assert yaml.safe_load(page.split("---")[1]).get("base_model") == named
        assert "# base, trained by grpo" in page
        assert "all: rows.jsonl\n" in page
        assert all(f"- {stop}\n" in page for stop in ("/a/b", "/"))
        assert str(tmp_path) not in page
        # What is no default is whole: who copies it has the sections' names, too.
        block = yaml.safe_load(page.split("```yaml")[1].split("```")[0])
        block["task"]["splits"]["all"] = settings["task"]["splits"]["all"]
        assert (
            Config.model_validate({"model": model, "output_dir": tmp_path / "run", **block})
            == config
        )


def test_an_adapter_is_for_peft(solver_dir: Path, tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "out"
    config = trained(solver_dir, run, adapter={"r": 4, "alpha": 64})
    export(run, output, checkpoint="last", form="adapter")
    base = AutoModelForCausalLM.from_pretrained(solver_dir)
    model = peft.PeftModel.from_pretrained(base, output)
    expected = logits(load_checkpoint(config, run / "checkpoints" / "last"))
    assert torch.equal(logits(model), expected)
    assert "library_name: peft" in (output / "README.md").read_text()


def test_whole_weights_have_no_adapter_and_a_push_is_only_made_when_asked(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    config = trained(solver_dir, run)
    with pytest.raises(ExportError, match="trained whole weights and no adapter"):
        export(run, tmp_path / "out", form="adapter")
    export(run, tmp_path / "out", checkpoint="last")
    expected = logits(load_checkpoint(config, run / "checkpoints" / "last"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            calls.append((name, options))
            return f"https://hub/{name}"

        def upload_folder(self, **options: Any) -> None:
            if options["repo_id"] == "me/refused":
                raise OSError("403")
            calls.append(("folder", options["folder_path"]))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push(tmp_path / "out", "me/mine") == "https://hub/me/mine"
    assert calls == [
        ("me/mine", {"private": True, "exist_ok": True}),
        ("folder", tmp_path / "out"),
    ]
    with pytest.raises(ExportError, match=r"cannot push .* to me/refused: 403"):
        push(tmp_path / "out", "me/refused")
