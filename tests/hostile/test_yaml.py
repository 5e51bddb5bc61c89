"""Configurations that cannot mean what they say."""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from selfdistill import cli
from selfdistill.analysis.sections import parse_methods
from selfdistill.config import Config, ConfigError, load_config, save_config
from selfdistill.config.yaml_text import YAMLTextError, read_yaml

START = "model: m\noutput_dir: o\n"
ENGINE = "{name: server, base_url: 'http://h/v1', model: m, "


def error(folder: Path, text: str | bytes) -> str:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value)


def with_critic(setting: str) -> str:
    return f"method: {{name: stepalign, critic: {{name: llm, engine: {ENGINE}{setting}}}}}}}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nsteps: 2\nseed: 3\n", "line 5: 'seed' is there already, in line 3"),
        (
            "rollout:\n  temperature: 1\n  temperature: 2\n",
            "line 5: 'temperature' is there already",
        ),
        ("task: {name: a, name: b}\n", "'name' is there already"),
        ("prompt: {student_template: {a: 1, a: 2}}\n", "'a' is there already"),
    ],
)
def test_a_key_that_is_there_twice(tmp_path: Path, text: str, said: str) -> None:
    assert f"run.yaml: {said}" in error(tmp_path, START + text) or said in error(
        tmp_path, START + text
    )


NUMBERS = [
    "steps",
    "seed",
    "prompts_per_step",
    "max_empty_steps",
    "rollout.temperature",
    "rollout.max_new_tokens",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "evaluation.every",
    "checkpoint.every",
    "prompt.max_length",
    "adapter.r",
]


@pytest.mark.parametrize("value", ["yes", "true", "on", "no", "false"])
@pytest.mark.parametrize("setting", NUMBERS)
def test_a_boolean_for_a_number(tmp_path: Path, setting: str, value: str) -> None:
    said = error(tmp_path, START + nested(setting, value))
    assert f"line 3: {setting}: " in said or f"line 4: {setting}: " in said
    assert "are true and false" in said
    assert said.count("\n") == 0


def nested(setting: str, value: str) -> str:
    *sections, name = setting.split(".")
    return "".join(f"{section}:\n  " for section in sections) + f"{name}: {value}\n"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("optimizer: {betas: [yes, 0.9]}\n", "optimizer.betas"),
        ("task: {step_counts: [on]}\n", "task.arithmetic.step_counts"),
        (
            "task: {name: jsonl, limit: yes, splits: {all: f}}\nmethod: {name: grpo}\n",
            "task.jsonl.limit",
        ),
        ("method: {name: grpo, group_size: yes}\n", "method.grpo.group_size"),
        (
            "method: {name: refsol, loss: {divergence_clip: yes}}\n",
            "method.refsol.loss.divergence_clip",
        ),
        (with_critic("retries: no"), "method.stepalign.critic.llm.engine.server.retries"),
    ],
)
def test_booleans_deep_inside(tmp_path: Path, text: str, where: str) -> None:
    said = error(tmp_path, START + text)
    assert f" {where}" in said
    assert "are true and false" in said


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    """Return a section and all sections inside it."""
    found = {model}

    def look(annotation: Any) -> None:
        for argument in typing.get_args(annotation):
            look(argument)
        is_class = typing.get_origin(annotation) is None and isinstance(annotation, type)
        if is_class and issubclass(annotation, BaseModel) and annotation not in found:
            found.update(sections(annotation))

    for field in model.model_fields.values():
        look(field.annotation)
    return found


def test_no_number_of_any_section_takes_a_boolean() -> None:
    tried = 0
    for section in sections(Config):
        for name, field in section.model_fields.items():
            kinds = {field.annotation, *typing.get_args(field.annotation)}
            if not kinds & {int, float} and "Positive" not in str(field.annotation):
                continue
            with pytest.raises(ValidationError) as caught:
                section.model_validate({name: True})
            said = [e for e in caught.value.errors() if e["loc"][:1] == (name,)]
            assert said, f"{section.__name__}.{name}"
            assert "are true and false" in said[0]["msg"], f"{section.__name__}.{name}"
            tried += 1
    assert tried > 40


def test_booleans_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"{START}shard: yes\nactivation_checkpointing: on\n"
        "task: {name: jsonl, splits: {all: f}, where: {solved: no, hard: yes}}\n"
        "method: {name: grpo, normalize_std: no}\n"
        "prompt: {student_template: {enable_thinking: no}}\n"
    )
    config = load_config(path)
    assert (config.shard, config.activation_checkpointing) == (True, True)
    assert config.task.where == {"solved": False, "hard": True}
    assert config.prompt.student_template == {"enable_thinking": False}
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "inf", "Infinity", "1e999"])
@pytest.mark.parametrize(
    "setting",
    [
        "optimizer.learning_rate",
        "optimizer.weight_decay",
        "optimizer.max_grad_norm",
        "rollout.temperature",
    ],
)
def test_no_number_is_infinite(tmp_path: Path, setting: str, value: str) -> None:
    said = error(tmp_path, START + nested(setting, value))
    assert f"line 4: {setting}: " in said


@pytest.mark.parametrize(
    "setting", ["extra_body: {top_p: .inf}", "extra_body: {since: 2026-01-01}"]
)
def test_a_request_is_json(tmp_path: Path, setting: str) -> None:
    assert "extra_body" in error(tmp_path, START + with_critic(setting))


@pytest.mark.parametrize(
    ("betas", "fine"),
    [
        ("[0.9, 0.99]", True),
        ("[0, 0]", True),
        ("[0.9, 1]", False),
        ("[1.0, 0.9]", False),
        ("[-0.1, 0.9]", False),
        ("[0.9, 1.1]", False),
        ("[0.9]", False),
        ("[0.9, 0.9, 0.9]", False),
    ],
)
def test_betas_are_shares_below_one(tmp_path: Path, betas: str, fine: bool) -> None:
    text = f"{START}optimizer: {{betas: {betas}}}\n"
    if fine:
        (tmp_path / "fine.yaml").write_text(text)
        load_config(tmp_path / "fine.yaml")
    else:
        assert "optimizer.betas" in error(tmp_path, text)


def nest(levels: int, inside: str, link: str) -> str:
    """Each level has nine of the one before."""
    lines = [f"a0: &a0 {inside}"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} {link.format(', '.join([f'*a{i - 1}'] * 9))}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (nest(9, "[x, x]", "[{}]"), "values once its aliases"),
        (nest(9, "{x: 1}", "{{<<: [{}]}}"), "values once its aliases"),
        ("a: &a [*a]", "values once its aliases"),
        ("a: &a {b: *a}", "values once its aliases"),
        ("[" * 1000, "nested too deeply"),
        ("{a: " * 1000, "nested too deeply"),
        (f"steps: {'9' * 5000}", "not valid YAML"),
        ("a: 2026-13-45", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: \x07", "not valid YAML"),
        ("a: *b", "not valid YAML"),
        ("? [1, 2]\n: 3", "not valid YAML"),
        ("\ta: 1", "not valid YAML"),
    ],
    ids=lambda text: text[:20],
)
def test_text_that_no_person_means(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(YAMLTextError, match=said):
        read_yaml(text)
    found = error(tmp_path, text)
    assert said in found
    assert found.startswith(str(tmp_path / "run.yaml"))
    assert "\n" not in found
    with pytest.raises(ConfigError, match="methods: "):
        parse_methods(text, Config(model="m", output_dir=tmp_path))


def test_a_few_aliases_are_fine() -> None:
    text = "base: &base {a: 1, b: [1, 2]}\none: {<<: *base, c: 3}\ntwo: *base\n"
    document = read_yaml(text)
    assert document.data["one"] == {"a": 1, "b": [1, 2], "c": 3}
    assert document.data["two"] == {"a": 1, "b": [1, 2]}
    assert (document.line(["one", "c"]), document.line(["base", "b", 1])) == (2, 1)
    assert read_yaml("").data is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\noutput_dir: o\n# caf\xe9\n".encode("latin-1"), "is not UTF-8 text"),
        ("model: m\noutput_dir: o\n".encode("utf-16"), "is not UTF-8 text"),
        (b"", "must hold a mapping of settings, got NoneType"),
        (b"- a", "must hold a mapping of settings, got list"),
        (b"7", "must hold a mapping of settings, got int"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: bytes, said: str) -> None:
    assert said in error(tmp_path, text)


def test_a_byte_order_mark_is_no_setting(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbf" + START.encode())
    assert load_config(tmp_path / "run.yaml").model == "m"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step: 3\n", "line 3: step: there is no such setting (did you mean steps?), got 3"),
        ("sead: 3\n", "did you mean seed?"),
        ("prompts_per_stp: 3\n", "did you mean prompts_per_step?"),
        ("optimizer:\n  lerning_rate: 1\n", "line 4: optimizer.lerning_rate: there is no such"),
        ("optimizer:\n  lerning_rate: 1\n", "did you mean learning_rate?"),
        ("learning_rate: 1\n", "there is no such setting here (it belongs into optimizer)"),
        ("temperature: 1\n", "it belongs into evaluation.sampling or method.loss or rollout"),
        (
            "rollout: {engine: {name: transformers, tensor_parallel_size: 2}}\n",
            "here (it belongs into rollout.engine with name: vllm), got 2",
        ),
        ("rollout: {engine: {name: transformers, check_every: 2}}\n", "vllm or vllm_server), got"),
        ("method: {name: grpo, normalise_std: true}\n", "did you mean normalize_std?"),
        ("method: {name: refsol, loss: {objektive: {}}}\n", "did you mean objective?"),
        ("method: {name: refsol, teacher: {name: ema, decai: 1}}\n", "did you mean decay?"),
        (with_critic("retrys: 1"), "did you mean retries?"),
        ("task: {step_count: [1]}\n", "did you mean step_counts?"),
        (
            "method: {name: refsol, loss: {token_clip: 1}}\n",
            "token_clip: there is no such setting (it is called divergence_clip now), got 1",
        ),
        (
            "method: {name: refsol, loss: {reduction: token_mean}}\n",
            "(it is called mean now), got 'token_mean'",
        ),
        (
            "task: {name: jsonl, splits: {al: f}}\nmethod: {name: grpo}\n",
            "did you mean all?",
        ),
        ("rollout: {engine: {name: transformers, zzz: 1}}\n", "(there are batch_size, name)"),
        ("method: {group_size: 4}\n", "it needs a `name`"),
        ("steps: -1\n", "line 3: steps: Input should be greater than 0, got -1"),
    ],
)
def test_a_misspelt_setting_gets_a_suggestion(tmp_path: Path, text: str, said: str) -> None:
    assert said in error(tmp_path, START + text)


def test_every_wrong_setting_has_a_line_of_its_own(tmp_path: Path) -> None:
    said = error(tmp_path, START + "steps: 0\nrollout:\n  temperature: 0\n  tokens: 3\n")
    lines = said.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"{tmp_path / 'run.yaml'}, line {n}" for n in (3, 5, 6)
    ]


@pytest.mark.parametrize("setting", ["model", "output_dir"])
@pytest.mark.parametrize("value", ['""', '" "', '"a\\0b"'])
def test_a_path_is_not_empty(tmp_path: Path, setting: str, value: str) -> None:
    other = {"model": "output_dir: o\n", "output_dir": "model: m\n"}[setting]
    assert f"line 2: {setting}: " in error(tmp_path, f"{other}{setting}: {value}\n")


def test_the_command_ends_in_these_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    for text in (f"{START}steps: yes\n", f"{START}seed: 1\nseed: 2\n", "\xff" * 3, "a: &a [*a]"):
        path.write_bytes(text.encode("latin-1"))
        for arguments in (["train", path], ["train", path, "--dry-run"], ["evaluate", path]):
            monkeypatch.setattr(sys, "argv", ["selfdistill", *map(str, arguments)])
            with pytest.raises(SystemExit) as caught:
                cli.main()
            assert caught.value.code == 1
            said = capsys.readouterr().err
            assert said.startswith(f"error: {path}")
            assert "Traceback" not in said


def test_no_setting_takes_what_json_cannot_hold() -> None:
    values: dict[str, Any] = {"model": "m", "output_dir": "o"}
    for template in ({"day": __import__("datetime").date(2026, 1, 1)}, {"x": float("inf")}):
        with pytest.raises(ValueError, match="student_template"):
            Config.model_validate({**values, "prompt": {"student_template": template}})


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml is missing: give a configuration"):
        load_config(tmp_path / "nowhere.yaml")
