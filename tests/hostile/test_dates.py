"""Chat templates that write the date: a run that goes on tomorrow keeps the prompts of today."""

from __future__ import annotations

import io
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_runs import assert_same_run
from tiny_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from selfdistill.config import Config, load_config
from selfdistill.filtering import FilterSettings, filter_problems
from selfdistill.model.folder import UnusableModelError
from selfdistill.planning.dry_run import dry_run
from selfdistill.prompts.chat import ChatTemplate
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.runlog import JsonLines
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.training.checkpoint import CheckpointStore
from selfdistill.training.loop import train
from selfdistill.training.solver import load_solver

# Llama 3.1's way of asking; the word-level tokenizer reads days and years digit by digit.
DATED = (
    "{{ bos_token }}{% if not date_string is defined %}"
    "{% set date_string = strftime_now('%d %m %Y') %}{% endif %}{{ date_string }} "
    "<user> {{ messages[0]['content'] }} <assistant>"
)
MODULES = (
    "prompts.chat",
    "training.loop",
    "filtering",
    "planning.dry_run",
    "critic.textgen.local",
)


def become(monkeypatch: pytest.MonkeyPatch, day: date) -> None:
    class Frozen(date):
        @classmethod
        def today(cls) -> date:  # type: ignore[override]
            return day

    for module in MODULES:
        monkeypatch.setattr(f"selfdistill.{module}.date", Frozen)


def save_model(folder: Path, template: str = DATED, *, positions: int = 128) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=positions,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(model: Path, output: Path, **changes: Any) -> Config:
    return Config.model_validate(
        {
            "model": str(model),
            "output_dir": str(output),
            "device": "cpu",
            "task": {"step_counts": [1]},
            "method": {"name": "refsol", "group_size": 2},
            "steps": 2,
            "prompts_per_step": 2,
            "rollout": {"max_new_tokens": 4},
            "optimizer": {"warmup_steps": 0},
            "evaluation": {"problems": 2, "samples": 1, "every": 2},
            **changes,
        }
    )


def test_a_template_is_told_the_day_it_should_write(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = DATED
    turn = [{"role": "user", "content": "What?"}]
    own = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert ChatTemplate(tokenizer).encode("What?") == own
    chat = ChatTemplate(tokenizer, today=date(2024, 2, 29))
    assert chat.writes_date
    assert tokenizer.decode(chat.encode("What?")).startswith("29 02 2024 <user>")
    given = ChatTemplate(tokenizer, {"date_string": "a day"}, today=date(2024, 2, 29))
    assert not given.writes_date
    assert tokenizer.decode(given.encode("What?")).startswith("a day <user>")
    assert chat.with_variables({"date_string": "b"}).encode("What?") != chat.encode("What?")
    become(monkeypatch, date(2031, 12, 1))
    assert tokenizer.decode(ChatTemplate(tokenizer).encode("?")).startswith("01 12 2031 <user>")


@pytest.mark.parametrize(
    "template",
    [
        "\n  {% if true %}  {{ strftime_now('%d.%m.') }} {% endif %}\n{{ text }}\n",
        '  {% set form = "%B %Y" %}\n\n{{ strftime_now(form) }}{{ text }}',
        "{% macro day() %}{{ strftime_now('%A') }}{% endmacro %}{{ day() }} {{ text }}",
        "{% if strftime_now is defined %}{{ strftime_now('%j') }}{% endif %}{{ text }}",
    ],
)
def test_nothing_but_the_day_changes(template: str) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template.replace("text", "messages[0].content")
    turn = [{"role": "user", "content": "What?"}]
    own = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    chat = ChatTemplate(tokenizer)
    assert chat.writes_date
    assert chat.encode("What?") == own
    assert ChatTemplate(tokenizer, today=date(2001, 2, 3)).encode("What?") != own


def test_a_date_that_cannot_be_kept_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ strftime_now('%' ~ 'd') }} {{ messages[0]['content'] }}"
    with pytest.raises(UnusableModelError, match="asks for the date in a form that is not written"):
        ChatTemplate(tokenizer)


def test_a_run_that_goes_on_another_day_has_the_prompts_of_its_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model")
    asked: list[str] = []
    generate = TransformersEngine.generate

    def recorded(self: TransformersEngine, prompts: Any, **kwargs: Any) -> Any:
        asked.extend(str(self.tokenizer.decode(prompt[1:9])) for prompt in prompts)
        return generate(self, prompts, **kwargs)

    monkeypatch.setattr(TransformersEngine, "generate", recorded)
    first = date(2026, 11, 28)
    become(monkeypatch, first)
    train(settings(model, tmp_path / "whole"))
    train(settings(model, tmp_path / "run", steps=1))
    become(monkeypatch, date(2026, 11, 29))
    train(settings(model, tmp_path / "run"), resume=True)
    assert {*asked} == {"28112026"}
    # The evaluation after one step is not part of a run that never stopped there.
    for log in ("evaluations.jsonl", "metrics.jsonl"):
        lines = JsonLines(tmp_path / "run" / log).read()
        assert lines
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert kept.prompt.date == first
    # What is measured later reads the same prompts.
    last = tmp_path / "run" / "checkpoints" / "last"
    asked.clear()
    solver = load_solver(kept, last)
    solver.attempt(split="dev", problems=1, samples=1, seed=0)
    assert asked == ["28112026"]
    # A new run has the new day.
    train(settings(model, tmp_path / "new", steps=1))
    assert load_config(tmp_path / "new" / "config.yaml").prompt.date == date(2026, 11, 29)


def test_a_run_that_ended_before_its_first_checkpoint_keeps_its_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(save_model(tmp_path / "model"), tmp_path / "run", steps=1)

    def stop(*_: Any, **__: Any) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched:
        become(patched, date(2026, 11, 28))
        patched.setattr(CheckpointStore, "save", stop)
        with pytest.raises(InterruptedError):
            train(config)
    become(monkeypatch, date(2026, 11, 29))
    train(config, resume=True)
    assert load_config(tmp_path / "run" / "config.yaml").prompt.date == date(2026, 11, 28)
    assert [path.name for path in (tmp_path / "run").glob("config*")] == ["config.yaml"]


def test_the_day_may_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model")
    become(monkeypatch, date(2026, 11, 28))
    train(settings(model, tmp_path / "one", prompt={"date": "2020-01-01"}))
    become(monkeypatch, date(2026, 11, 29))
    train(settings(model, tmp_path / "other", prompt={"date": "2020-01-01"}))
    assert_same_run(tmp_path / "one", tmp_path / "other")


def test_a_run_whose_template_writes_no_date_records_none(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", build_tokenizer().chat_template)
    train(settings(model, tmp_path / "run", steps=1))
    assert load_config(tmp_path / "run" / "config.yaml").prompt.date is None


@pytest.mark.parametrize("template", [DATED, build_tokenizer().chat_template])
def test_a_dry_run_says_so(tmp_path: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    become(monkeypatch, date(2026, 11, 28))
    console = Console(file=io.StringIO(), width=200)
    dry_run(settings(save_model(tmp_path / "model", template), tmp_path / "run"), console)
    assert isinstance(console.file, io.StringIO)
    said = "The chat template writes the date, 2026-11-28 here." in console.file.getvalue()
    assert said == (template == DATED)


def test_a_critic_is_told_the_day_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = save_model(tmp_path / "critic", positions=2048)
    solver = save_model(tmp_path / "solver", build_tokenizer().chat_template)
    engine = {"name": "transformers", "model": str(critic), "max_new_tokens": 4}
    method = {"name": "stepalign", "group_size": 2, "critic": {"name": "llm", "engine": engine}}
    become(monkeypatch, date(2026, 11, 28))
    days = []
    for day in (None, "2020-01-01"):
        config = settings(solver, tmp_path / "run", method=method, prompt={"date": day})
        generator = load_solver(config).build_method(config.method).critic._generator
        ids = generator._chat.encode("47")
        days.append((str(build_tokenizer().decode(ids[1:9])), generator.identity))
    assert [day for day, _ in days] == ["28112026", "01012020"]
    assert '"date": "2020-01-01"' in days[1][1]


def test_a_filter_keeps_the_day_of_its_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(save_model(tmp_path / "model"), tmp_path / "run")
    config = config.model_copy(update={"method": Config(model="m", output_dir="o").method})
    output = tmp_path / "kept.jsonl"
    chosen = FilterSettings(samples=1, split="dev", problems=2)
    for day in (28, 29):
        become(monkeypatch, date(2026, 11, day))
        filter_problems(config, output, chosen, console=Console(quiet=True))
        begun = JsonLines(tmp_path / "kept.jsonl.journal").read()[0]
        assert begun["prompt"]["date"] == "2026-11-28"
