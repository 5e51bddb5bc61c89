"""Model folders that cannot be used: one line says which setting and file, and what to do."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma3Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from selfdistill.config import Config, TransformersTextEngine
from selfdistill.critic.textgen.local import load_local_generator
from selfdistill.model.folder import UnusableModelError, load_causal_lm
from selfdistill.model.weights import load_model
from selfdistill.planning.dry_run import dry_run
from selfdistill.rollout.engine import EngineError
from selfdistill.rollout.vllm_engine import VLLMEngine
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.training.solver import load_solver

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "good"
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def settings(model: Path | str, **changes: Any) -> Config:
    return Config.model_validate(
        {"model": str(model), "output_dir": "run", "device": "cpu", **changes}
    )


def change(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def change_to_latin_1(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\xe9")


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def lose_a_shard(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="3KB")
    sorted(folder.glob("model-*"))[1].unlink()


def become_bert(folder: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    change(folder / "config.json", model_type="t5")


# What happens to a folder, and what is said about it. A dry run reads all but the weights.
CONFIGURATION = {
    "no config.json": (
        lambda f: (f / "config.json").unlink(),
        r"config\.json is missing .*it holds .*tokenizer\.json",
    ),
    "a torn config.json": (
        lambda f: cut(f / "config.json"),
        r"/config\.json is not valid JSON \(.*\): copy it again",
    ),
    "a number without end": (
        lambda f: (f / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}"),
        r"/config\.json is not valid JSON \(it holds a number of thousands of digits\): copy it",
    ),
    "a list": (
        lambda f: (f / "config.json").write_text("[1, 2]"),
        r"/config\.json holds a list, expected a JSON object",
    ),
    "no family": (
        lambda f: change(f / "config.json", model_type=None),
        r"/config\.json has no model_type, expected the family",
    ),
    "an unknown family": (
        lambda f: change(f / "config.json", model_type="llamoid"),
        r"has model_type 'llamoid', which transformers \S+ does not know",
    ),
    "code of its own": (
        lambda f: change(
            f / "config.json", model_type="llamoid", auto_map={"AutoConfig": "x.LlamoidConfig"}
        ),
        r"asks to run code that comes with the model .*which this program never does",
    ),
    "wrong values": (
        lambda f: change(f / "config.json", hidden_size="many"),
        r"the configuration of \S+ cannot be loaded: .*hidden_size",
    ),
    "GPTQ": (
        lambda f: change(f / "config.json", quantization_config={"quant_method": "gptq"}),
        r"is quantised \(quantization_config in its config\.json: gptq\), expected plain weights",
    ),
    "FP8": (
        lambda f: change(f / "config.json", quantization_config={"quant_method": "fp8"}),
        r"is quantised \(quantization_config in its config\.json: fp8\)",
    ),
    "a model that sees": (
        lambda f: (f / "config.json").write_text(json.dumps(Gemma3Config().to_dict())),
        r"is a gemma3 model with vision_config in its config\.json, expected a language model",
    ),
    "an encoder-decoder": (become_bert, r"is a t5 model, expected one that transformers"),
    "an adapter": (
        lambda f: (f / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": "some/base"})
        ),
        r"holds an adapter of 'some/base' \(adapter_config\.json\), expected a whole model",
    ),
}
TOKENIZER = {
    "no tokenizer": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        r"tokenizer\.json is missing",
    ),
    "a torn tokenizer": (
        lambda f: cut(f / "tokenizer.json"),
        r"/tokenizer\.json is not valid JSON",
    ),
    "a tokenizer in Latin-1": (
        lambda f: change_to_latin_1(f / "tokenizer.json"),
        r"/tokenizer\.json is not valid JSON \(its byte \d+ is 0xe9, which is no UTF-8\)",
    ),
    "a tokenizer's settings in Latin-1": (
        lambda f: change_to_latin_1(f / "tokenizer_config.json"),
        r"/tokenizer_config\.json is not valid JSON \(its byte \d+ is 0xe9, which is no UTF-8\)",
    ),
    "a chat template in Latin-1": (
        lambda f: change_to_latin_1(f / "chat_template.jinja"),
        r"/chat_template\.jinja is no UTF-8 text \(.*\): copy it again, or save it as UTF-8",
    ),
    "a foreign tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "Telepathy"}}'),
        r"the tokenizer of \S+ cannot be loaded: ",
    ),
    "no chat template": (
        lambda f: (f / "chat_template.jinja").unlink(),
        r"has no chat template, .*set prompt\.chat_template to a file",
    ),
    "a template that is no Jinja": (
        lambda f: (f / "chat_template.jinja").write_text("{% if %}"),
        r"prompt: the chat template of \S+ fails on a single user turn \(TemplateSyntaxError",
    ),
    "a template that wants more": (
        lambda f: (f / "chat_template.jinja").write_text(
            "{{ raise_exception('a system turn comes first') }}"
        ),
        r"fails on a single user turn \(TemplateError: a system turn comes first\)",
    ),
    "more tokens than rows": (
        lambda f: change(f / "config.json", vocab_size=40),
        r"its tokenizer has token 63 \('\S+'\), but its embedding 40 rows",
    ),
}
WEIGHT_FILES = {
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"model\.safetensors is missing"),
    "pickled weights": (
        pickle_weights,
        r"has its weights in pytorch_model\.bin, expected model\.safetensors: pickled files can",
    ),
    "GGUF weights": (
        lambda f: (f / WEIGHTS).rename(f / "model-Q4_K_M.gguf"),
        r"has its weights in model-Q4_K_M\.gguf, expected model\.safetensors",
    ),
    "torn weights": (
        lambda f: cut(f / WEIGHTS),
        r"/model\.safetensors \([\d,]+ bytes\) is torn or no safetensors file",
    ),
    "empty weights": (
        lambda f: (f / WEIGHTS).write_bytes(b""),
        r"/model\.safetensors \(0 bytes\) is torn",
    ),
    "a Git LFS pointer": (
        lambda f: (f / WEIGHTS).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
        ),
        r"/model\.safetensors is a Git LFS pointer, .*git lfs pull",
    ),
    "a lost shard": (
        lose_a_shard,
        r"model-00002-of-\d+\.safetensors \(named in model\.safetensors\.index\.json\) is missing",
    ),
    "a torn generation_config.json": (
        lambda f: cut(f / "generation_config.json"),
        r"/generation_config\.json is not valid JSON \(.*\): copy it again",
    ),
    "a generation_config.json that is a list": (
        lambda f: (f / "generation_config.json").write_text("[1]"),
        r"/generation_config\.json holds a list, expected a JSON object",
    ),
    "a torn index": (
        lambda f: (lose_a_shard(f), cut(f / "model.safetensors.index.json")),
        r"/model\.safetensors\.index\.json is not valid JSON",
    ),
    "a tensor too few": (
        lambda f: change_tensors(f, lambda tensors: tensors.pop(UP)),
        rf"its weight files lack 1 of the model's tensors: {re.escape(UP)}\. They would start",
    ),
    "a head that is not there": (
        lambda f: change_tensors(f, lambda tensors: tensors.pop("lm_head.weight")),
        r"lack 1 of the model's tensors: lm_head\.weight",
    ),
    "more layers than weights": (
        lambda f: change(f / "config.json", num_hidden_layers=3),
        r"lack 9 of the model's tensors: model\.layers\.2\.\S+, .* and 4 more",
    ),
    "another shape": (
        lambda f: change_tensors(f, lambda tensors: tensors.update({UP: torch.zeros(3, 4)})),
        rf"{re.escape(UP)} is \[3, 4\] instead of \[16, 16\]\. Copy both from one place",
    ),
}


def message(action: Callable[[], object]) -> str:
    with pytest.raises(UnusableModelError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("case", [*CONFIGURATION, *TOKENIZER, *WEIGHT_FILES])
def test_a_solver_that_cannot_be_used_is_refused_in_one_line(folder: Path, case: str) -> None:
    breaks, expected = {**CONFIGURATION, **TOKENIZER, **WEIGHT_FILES}[case]
    breaks(folder)
    if case == "more tokens than rows":
        rows = {"model.embed_tokens.weight": 40, "lm_head.weight": 40}
        change_tensors(folder, lambda t: t.update({n: t[n][:r].clone() for n, r in rows.items()}))
    text = message(lambda: load_solver(settings(folder)))
    assert re.search(expected, text), text
    assert str(folder) in text
    assert text.startswith(("model: ", "prompt: ", "tokenizer "))


@pytest.mark.parametrize("case", [*CONFIGURATION, *TOKENIZER])
def test_a_dry_run_says_the_same(folder: Path, case: str) -> None:
    breaks, expected = {**CONFIGURATION, **TOKENIZER}[case]
    breaks(folder)
    text = message(lambda: dry_run(settings(folder), Console(file=io.StringIO())))
    assert re.search(expected, text), text


@pytest.mark.parametrize("case", [*CONFIGURATION, *TOKENIZER, *WEIGHT_FILES])
def test_a_critic_is_loaded_with_the_same_care(folder: Path, case: str) -> None:
    breaks, expected = {**CONFIGURATION, **TOKENIZER, **WEIGHT_FILES}[case]
    breaks(folder)
    engine = TransformersTextEngine(model=str(folder), max_new_tokens=8)
    text = message(lambda: load_local_generator(engine, device="cpu"))
    expected = expected.replace(r"prompt\.chat", r"method\.critic\.engine\.chat")
    assert re.search(expected.replace("prompt: ", r"method\.critic\.engine: "), text), text
    assert "method.critic.engine" in text or text.startswith("tokenizer ")


def test_vllm_is_not_asked_for_what_cannot_be_used(folder: Path) -> None:
    tokenizer = build_tokenizer()
    change(folder / "config.json", quantization_config={"quant_method": "awq"})
    engine = settings(folder, rollout={"engine": {"name": "vllm"}}).rollout.engine
    assert "is quantised" in message(lambda: VLLMEngine(str(folder), tokenizer, engine))


def test_a_checkpoint_that_lacks_tensors_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(UP))
    assert UP in message(lambda: load_model(settings(folder), folder))


def test_tied_heads_and_added_tokens_out_of_reach_are_fine(good: Path, tmp_path: Path) -> None:
    """Gemma 3's 1B model has a token for images behind the last row of its embedding."""
    tokenizer: PreTrainedTokenizerBase = build_tokenizer()
    config = LlamaConfig.from_pretrained(good)
    config.tie_word_embeddings = True
    folder = tmp_path / "tied"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == config.vocab_size
    tokenizer.save_pretrained(folder)
    solver = load_solver(settings(folder))
    (problem,) = solver.task.problems(split="train", count=1)
    assert max(solver.context.student_prompt(problem)) < config.vocab_size
    (folder / "chat_template.jinja").write_text("<image>{{ messages[0]['content'] }}")
    assert "its tokenizer has token 64 ('<image>')" in message(
        lambda: load_solver(settings(folder))
    )


def test_a_base_model_takes_a_template_from_a_file(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    template = tmp_path / "turn.jinja"
    template.write_text("<user> {{ messages[0]['content'] }} <assistant>")
    solver = load_solver(settings(folder, prompt={"chat_template": str(template)}))
    (problem,) = solver.task.problems(split="train", count=1)
    prompt = solver.tokenizer.decode(solver.context.student_prompt(problem))
    assert prompt == f"<user> {problem.question} <assistant>"
    engine = TransformersTextEngine(
        model=str(folder), max_new_tokens=8, chat_template=str(template)
    )
    load_local_generator(engine, device="cpu")


@pytest.mark.parametrize("content", ["{{ messages }}".encode("utf-16"), b"caf\xe9", None])
def test_a_template_that_cannot_be_read_is_named(
    folder: Path, tmp_path: Path, content: bytes | None
) -> None:
    template = tmp_path / "turn.jinja"
    if content is not None:
        template.write_bytes(content)
    expected = rf"cannot read the chat template {re.escape(str(template))} .*chat_template"
    changed = settings(folder, prompt={"chat_template": str(template)})
    engine = TransformersTextEngine(
        model=str(folder), max_new_tokens=8, chat_template=str(template)
    )
    for action in (
        lambda: load_solver(changed),
        lambda: dry_run(changed, Console(file=io.StringIO())),
        lambda: load_local_generator(engine, device="cpu"),
    ):
        assert re.search(expected, message(action))


def test_the_command_line_prints_one_line(folder: Path, tmp_path: Path) -> None:
    cut(folder / WEIGHTS)
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {folder}\noutput_dir: {tmp_path / 'run'}\ndevice: cpu\n")
    result = subprocess.run(
        [sys.executable, "-m", "selfdistill", "train", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: model: {folder / WEIGHTS} (")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_name_whose_only_weights_are_pickled_is_refused(folder: Path, tmp_path: Path) -> None:
    """A folder is looked through before it is loaded; a name is known to the Hub's cache alone."""
    pickle_weights(folder)
    cached = tmp_path / "hub" / "models--some--pickled"
    revision = "0" * 40
    shutil.copytree(folder, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    path = tmp_path / "run.yaml"
    path.write_text(f"model: some/pickled\noutput_dir: {tmp_path / 'run'}\ndevice: cpu\n")
    result = subprocess.run(
        [sys.executable, "-m", "selfdistill", "train", str(path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 1
    assert result.stderr.startswith(
        "error: model: 'some/pickled' has its weights in pytorch_model.bin, expected "
        "model.safetensors: pickled files can run code and are not read"
    )


def bring_code(folder: Path, ran: Path) -> None:
    """Give a model code of its own, which writes down that it ran, and does nothing else."""
    classes = {
        "configuration": ("AutoConfig", "LlamaConfig"),
        "modeling": ("AutoModelForCausalLM", "LlamaForCausalLM"),
        "tokenization": ("AutoTokenizer", "PreTrainedTokenizerFast"),
    }
    for name, (_, base) in classes.items():
        (folder / f"{name}_own.py").write_text(
            f"import pathlib, transformers\n"
            f"with pathlib.Path({str(ran)!r}).open('a') as file:\n"
            f"    file.write('{name}\\n')\n"
            f"class Own(transformers.{base}): pass\n"
        )
    auto_map = {auto: f"{name}_own.Own" for name, (auto, _) in classes.items()}
    tokenizer = auto_map.pop("AutoTokenizer")
    change(folder / "config.json", auto_map=auto_map)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, tokenizer]})


def test_code_of_a_model_does_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through no door: solver, dry run, checkpoint, critic, nor the engine that has its own."""
    ran = tmp_path / "ran"
    bring_code(folder, ran)
    config = settings(folder, rollout={"engine": {"name": "vllm"}})
    asked: list[dict[str, Any]] = []

    class Stop(Exception):
        pass

    def start(source: str, **options: Any) -> None:
        asked.append(options)
        raise Stop

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=start))
    solver = load_solver(config)
    dry_run(config, Console(file=io.StringIO()))
    load_model(config, folder)
    critic = TransformersTextEngine(model=str(folder), max_new_tokens=8)
    load_local_generator(critic, device="cpu")
    with pytest.raises(EngineError, match="failed while starting: Stop"):
        solver.engine.sync(solver.model)
    assert [options["trust_remote_code"] for options in asked] == [False]
    assert not ran.exists()
    # And it is code that would run where it is trusted.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for kind in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        with suppress(ValueError):  # the classes do not fit together, which is found afterwards
            kind.from_pretrained(folder, trust_remote_code=True)
    assert set(ran.read_text().split()) == {"configuration", "modeling", "tokenization"}


def test_whatever_loads_by_name_trusts_no_code() -> None:
    """Everything that loads by name says so, whatever transformers' default may be."""
    calls = []
    # The scripts directly in examples/ are loops of a user, who decides.
    ours = ("selfdistill/**/*.py", "studies/**/*.py", "examples/*/**/*.py")
    for path in chain.from_iterable(map(ROOT.glob, ours)):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"\bAuto\w+\.from_\w+\([^()]*(?:\([^()]*\)[^()]*)*\)", text):
            calls.append((path.name, match[0]))
    assert len(calls) >= 5
    assert [call for call in calls if "trust_remote_code=False" not in call[1]] == []


def test_weights_that_are_whole_are_loaded_as_they_are(good: Path) -> None:
    model = load_causal_lm(str(good), dtype=torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    saved = load_file(good / WEIGHTS)
    assert torch.equal(model.get_parameter(UP), saved[UP].bfloat16())
