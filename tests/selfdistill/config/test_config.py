from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from selfdistill.config import (
    Config,
    ConfigError,
    GeneralizedJSD,
    LossConfig,
    RefSolMethod,
    load_config,
    save_config,
)
from selfdistill.config.overrides import override


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def with_loss(**loss: Any) -> dict[str, Any]:
    return {"method": {"name": "refsol", "loss": loss}}


def test_yaml_round_trip_keeps_every_setting(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "model": "some/solver",
            "output_dir": "runs/x",
            "method": {
                "name": "refsol",
                "group_size": 3,
                "loss": {"objective": {"name": "jsd", "beta": 0.25}},
            },
            "optimizer": {"learning_rate": 3e-4, "betas": [0.8, 0.95]},
            "steps": 7,
        }
    )
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    loss = LossConfig(objective=GeneralizedJSD(beta=0.25))
    assert config.method == RefSolMethod(group_size=3, loss=loss)


def test_numbers_may_be_written_the_short_way(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-4 as a string.
    path = write(tmp_path, "model: m\noutput_dir: o\noptimizer: {learning_rate: 1e-4}\n")
    assert load_config(path).optimizer.learning_rate == 1e-4


def test_a_model_folder_is_found_next_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "solver").mkdir()
    path = write(tmp_path, "model: solver\noutput_dir: o\n")
    assert load_config(path).model == str(tmp_path / "solver")
    path = write(tmp_path, "model: Qwen/Qwen3-1.7B\noutput_dir: o\n")
    assert load_config(path).model == "Qwen/Qwen3-1.7B"


JSONL = {"name": "jsonl", "splits": {"all": "problems.jsonl"}}
GRPO = {"name": "grpo"}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"learning_rate": 1e-4}, "learning_rate"),
        ({"method": {"name": "refsol", "critic": {"name": "scribe"}}}, "method.refsol.critic"),
        ({"method": {"name": "wishful"}}, "method"),
        (with_loss(objective={"name": "forward_kl", "beta": 0.5}), "forward_kl.beta"),
        (with_loss(objective={"name": "jsd", "beta": 1.5}), "jsd.beta"),
        (with_loss(advantage_mask={"threshold": -0.1}), "advantage_mask.threshold"),
        ({"rollout": {"temperature": 0}}, "rollout.temperature"),
        ({"method": {"name": "refsol", "teacher": {"name": "wise"}}}, "refsol.teacher"),
        ({"rollout": {"engine": {"name": "guess"}}}, "rollout.engine"),
        ({"rollout": {"engine": {"name": "vllm", "block_size": 16}}}, "engine.vllm.block_size"),
        ({"steps": 0}, "steps"),
        (with_loss(objective={"name": "skew_kl", "beta": 1}), "skew_kl.beta"),
        (with_loss(top_k={"tail": False}), "top_k.k"),
        (with_loss(advantage_mask={"top_fraction": 0}), "advantage_mask.top_fraction"),
        ({"method": {"name": "peer", "group_size": 1}}, "peer.group_size"),
        ({"method": {"name": "environment", "detail": "all"}}, "environment.detail"),
        (
            {"method": {"name": "stepalign", "critic": {"name": "scribe", "copying": "much"}}},
            "scribe.copying",
        ),
        ({"method": {"name": "grpo", "teacher": {"name": "base"}}}, "grpo.teacher"),
        ({"method": {"name": "grpo", "loss": {}}}, "grpo.loss"),
        ({"method": {"name": "grpo", "group_size": 1}}, "grpo.group_size"),
        ({"method": {"name": "grpo", "kl": {"coefficient": 0}}}, "kl.coefficient"),
    ],
)
def test_what_means_nothing_cannot_be_written(change: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"model": "m", "output_dir": "o", **change})
    places = [".".join(map(str, error["loc"])) for error in caught.value.errors()]
    assert any(place.endswith(where) for place in places), places


def test_importance_weights_compare_like_with_like() -> None:
    settings: dict[str, Any] = {"model": "m", "output_dir": "o", "rollout": {"temperature": 1.1}}
    with pytest.raises(ValidationError, match=r"loss\.temperature to rollout\.temperature"):
        Config.model_validate({**settings, **with_loss(importance_clip=2.0)})
    Config.model_validate({**settings, **with_loss(importance_clip=2.0, temperature=1.1)})


def test_vllm_takes_adapters_up_to_a_rank() -> None:
    settings: dict[str, Any] = {"model": "m", "output_dir": "o"}
    settings["rollout"] = {"engine": {"name": "vllm"}}
    Config.model_validate({**settings, "adapter": {"r": 512}})
    with pytest.raises(ValidationError, match=r"adapter\.r: got 513, .* up to rank 512"):
        Config.model_validate({**settings, "adapter": {"r": 513}})
    Config.model_validate({**settings, "rollout": {}, "adapter": {"r": 513}})


def test_settings_cannot_change_during_a_run() -> None:
    config = Config(model="m", output_dir=Path("o"))
    with pytest.raises(ValidationError, match="frozen"):
        config.steps = 3


@pytest.mark.parametrize(("text", "message"), [("- a\n- b\n", "mapping"), ("a: [", "valid YAML")])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.yaml.*{message}"):
        load_config(write(tmp_path, text))


def test_a_wrong_file_names_itself_and_every_wrong_field(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\noutput_dir: o\nsteps: -1\nrollout: {topk: 5}\n")
    with pytest.raises(ConfigError, match=r"(?s)run\.yaml.*steps: .*-1.*rollout\.topk: .*got 5"):
        load_config(path)


def test_every_setting_says_what_it_does() -> None:
    def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
        found = [model]
        for field in model.model_fields.values():
            for kind in [field.annotation, *typing.get_args(field.annotation)]:
                # Python 3.10 takes tuple[str, ...] for a type.
                is_class = isinstance(kind, type) and typing.get_origin(kind) is None
                if is_class and issubclass(kind, BaseModel):
                    found += sections(kind)
        return found

    silent = [
        f"{section.__name__}.{name}"
        for section in sections(Config)
        for name, field in section.model_fields.items()
        if not field.description
        and name != "name"
        and not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel))
    ]
    assert not silent
    assert {"GeneralizedJSD", "AdvantageMaskConfig", "StepAlignMethod"} <= {
        section.__name__ for section in sections(Config)
    }


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "at least one of train, dev and test"),
        ({"train": "a", "all": "b"}, "Extra inputs"),
        ({"all": "a", "shares": {"train": 0.9, "dev": 0.2, "test": 0}}, "must sum to 1, got 1.1"),
        (
            {"all": "a", "shares": {"train": 0.9, "dev": 0.1, "test": 0}, "counts": {"dev": 1}},
            "give shares or counts, not both",
        ),
    ],
)
def test_splits_that_mean_nothing_are_refused(splits: dict[str, Any], message: str) -> None:
    task = {"name": "jsonl", "splits": splits}
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"model": "m", "output_dir": "o", "task": task, "method": GRPO})


@pytest.mark.parametrize(
    "task",
    [
        "{name: jsonl, splits: {all: a.jsonl, counts: {dev: 2}}}",
        "{name: python, file: a.py, counts: {dev: 2, test: 3}}",
    ],
)
def test_counts_are_read_back_from_a_saved_file(tmp_path: Path, task: str) -> None:
    text = f"model: m\noutput_dir: o\nmethod: {{name: grpo}}\ntask: {task}\n"
    config = load_config(write(tmp_path, text))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_the_scribe_is_refused_by_name_for_other_tasks(tmp_path: Path) -> None:
    text = "model: m\noutput_dir: o\ntask: {name: jsonl, splits: {all: a.jsonl}}\n"
    with pytest.raises(
        ConfigError, match=r"method\.critic: the scribe .* the task is jsonl"
    ) as got:
        load_config(write(tmp_path, text))
    assert "got {" not in str(got.value)  # the whole configuration says nothing
    load_config(write(tmp_path, text + "method: {name: grpo}\n"))


def test_refsol_asks_for_references(tmp_path: Path) -> None:
    text = "model: m\noutput_dir: o\nmethod: {name: refsol}\n"
    task = "task: {{name: hub, path: d, splits: {{all: train}}{}}}\n"
    with pytest.raises(ConfigError, match=r"task\.reference: refsol shows .* of the hub data"):
        load_config(write(tmp_path, text + task.format("")))
    load_config(write(tmp_path, text + task.format(", reference: solution")))


def test_all_paths_count_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    critic = "{name: llm, engine: {name: transformers, model: ./c, cache: d, chat_template: e}}"
    text = f"""
model: ../m
output_dir: runs/o
prompt: {{chat_template: t.jinja}}
task: {{name: jsonl, splits: {{all: sub/a.jsonl}}}}
method: {{name: stepalign, critic: {critic}}}
"""
    config = load_config(write(tmp_path, text))
    assert config.model == str(tmp_path.parent / "m")
    assert config.output_dir == tmp_path / "runs" / "o"
    assert config.prompt.chat_template == str(tmp_path / "t.jinja")
    assert config.task.splits.all == str(tmp_path / "sub" / "a.jsonl")
    engine = config.method.critic.engine
    assert engine.model == str(tmp_path / "c")
    assert engine.cache == tmp_path / "d"
    assert engine.chat_template == str(tmp_path / "e")
    save_config(config, tmp_path / "elsewhere" / "saved.yaml")
    assert load_config(tmp_path / "elsewhere" / "saved.yaml") == config


def test_a_path_that_counts_from_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "solver").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    path = write(tmp_path, "model: solver\noutput_dir: o\n")
    with pytest.raises(ConfigError, match=r"line 1: model: .* paths count from the YAML file"):
        load_config(path)
    here = Config(model="solver", output_dir=Path("o"))
    assert here.model == str(tmp_path / "here" / "solver")
    assert here.output_dir == tmp_path / "here" / "o"


def test_files_of_a_task_are_found_next_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    text = "model: m\noutput_dir: o\nmethod: {name: grpo}\n"
    for splits, name in [("{all: a.jsonl}", "all"), ("{train: a.jsonl, test: b.jsonl}", "train")]:
        path = write(tmp_path, f"{text}task: {{name: jsonl, splits: {splits}}}\n")
        task = load_config(path).task
        assert task.name == "jsonl"
        assert getattr(task.splits, name) == str(tmp_path / "a.jsonl")
    assert task.splits.test == str(tmp_path / "b.jsonl")
    config = load_config(path)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_settings_of_the_command_line_count(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\noutput_dir: o\nsteps: 3\noptimizer: {learning_rate: 1e-4}\n")
    config = load_config(
        path, ["steps=5", "optimizer.learning_rate=1e-5", "rollout.top_p=0.9", "output_dir=../x"]
    )
    assert (config.steps, config.optimizer.learning_rate, config.rollout.top_p) == (5, 1e-5, 0.9)
    assert config.output_dir == tmp_path.parent / "x"
    for wrong, message in [
        ("steps", r"'steps' is no setting, expected name=value"),
        ("steps.a=1", r"steps is 3 in the file, expected a mapping"),
        ("steps=[", r"on the command line: not valid YAML"),
        ("steps=-1", r"steps=-1 on the command line: steps: .* greater than 0"),
        ("optimizer.leaning_rate=1", r"command line: .*did you mean learning_rate\?"),
        ("method.name=grop", r"^method\.name=grop on the command line: method: "),
        ("method={name: grpo, group_size: [a]}", r"^method=.* on the command line: .*group_size"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(path, [wrong])


def test_what_is_wrong_in_the_file_is_not_blamed_on_the_command_line(tmp_path: Path) -> None:
    engine = "{name: transformers, model: 3}"
    text = f"""model: m
output_dir: o
method:
  name: stepalign
  critic: {{name: llm, engine: {engine}}}
"""
    innocent = ["model=n", "method.name=stepalign", "method.critic.name=llm"]
    with pytest.raises(ConfigError, match=r"line 5: .*model: .*got 3") as got:
        load_config(write(tmp_path, text), innocent)
    assert "command line" not in str(got.value)


def test_a_setting_of_the_command_line_stays_out_of_other_sections() -> None:
    settings = yaml.safe_load("a: &same {x: {y: 1}, z: 2}\nb: *same\n")
    changed = override(settings, ["a.x.y=3", "a.z=4"])
    assert changed == {"a": {"x": {"y": 3}, "z": 4}, "b": {"x": {"y": 1}, "z": 2}}
    assert settings["a"] == settings["b"] == {"x": {"y": 1}, "z": 2}
