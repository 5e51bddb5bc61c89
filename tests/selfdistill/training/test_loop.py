from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slow import slow_but
from tiny_runs import assert_same_run, lines, tensors
from transformers import LlamaForCausalLM

import selfdistill.training.batch
import selfdistill.training.gradients
import selfdistill.training.loop
from selfdistill.config import (
    AdapterConfig,
    Config,
    ConfigError,
    LossConfig,
    RefSolMethod,
    load_config,
)
from selfdistill.evaluation.scores import Evaluation
from selfdistill.model.attention import UnavailableBackendError, UnsupportedModelError
from selfdistill.model.scoring import score
from selfdistill.model.weights import TrainedWeights
from selfdistill.prompts.context import PromptTooLongError
from selfdistill.rollout.attempts import Attempts, judge
from selfdistill.rollout.engine import EngineError, Rollout
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.runlog import JsonLines
from selfdistill.seeds import derive_seed
from selfdistill.tasks.answers import PlainChecker
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.interface import TaskError
from selfdistill.training.checkpoint import CheckpointError
from selfdistill.training.divergence import DivergedError
from selfdistill.training.empty_steps import NothingLearnedError
from selfdistill.training.loop import train
from selfdistill.training.run_folder import RunExistsError
from selfdistill.training.solver import Solver, load_solver


def stepalign(**changes: Any) -> dict[str, Any]:
    return {"name": "stepalign", "group_size": 2, **changes}


def refsol(**changes: Any) -> dict[str, Any]:
    return {"name": "refsol", "group_size": 2, **changes}


def grpo(**changes: Any) -> dict[str, Any]:
    return {"name": "grpo", "group_size": 4, **changes}


def make_config(solver_dir: Path, output_dir: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "model": str(solver_dir),
        "output_dir": output_dir,
        "task": {"step_counts": [1, 2]},
        "method": stepalign(),
        "device": "cpu",
        "seed": 3,
        "steps": 4,
        "prompts_per_step": 2,
        "rollout": {"max_new_tokens": 12},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 3},
        "evaluation": {"every": 2, "problems": 3, "samples": 2},
    }
    return Config.model_validate({**settings, **changes})


def interrupt_at_call(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Press Ctrl-C in the middle of the `call`-th scoring of the run."""
    calls = 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGINT)
        return score(*args, **kwargs)

    monkeypatch.setattr(selfdistill.training.gradients, "score", interrupted)


def test_a_run_leaves_what_it_promises(solver_dir: Path, tmp_path: Path) -> None:
    config = make_config(solver_dir, tmp_path / "run")
    result = train(config)
    assert (result.step, result.interrupted) == (4, False)
    assert load_config(tmp_path / "run" / "config.yaml") == config
    metrics = JsonLines(tmp_path / "run" / "metrics.jsonl").read()
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in metrics] == pytest.approx(
        [1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2]
    )
    for line in metrics:
        # No advantage mask: two sums of the same few dozen positive numbers, in float32.
        assert line["loss"] == pytest.approx(line["kl"], rel=1e-5)
        assert line["kl"] > 0
        assert line["entropy"] > 0
        assert line["active"] == 1
        assert line["grad_norm"] > 0
        assert 4 <= line["tokens"] <= 4 * 12
        assert 0 < line["packed_tokens"] < line["unshared_tokens"]
        assert line["peak_rss_mib"] > 10
        assert {"rollout", "critique", "score", "update"} <= line["seconds"].keys()
    evaluations = JsonLines(tmp_path / "run" / "evaluations.jsonl").read()
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    values = {}
    for line in evaluations:
        step = line.pop("step")
        evaluation = Evaluation.from_json(json.dumps(line))
        assert (len(evaluation.problems), evaluation.samples) == (3, 2)
        values[step] = evaluation.avg_at_k.value
    assert result.best_metric == max(values.values()) == values[result.best_step or 0]
    best = (tmp_path / "run" / "checkpoints" / "best").resolve()
    assert best.name == f"step-{result.best_step:06d}"


def test_training_moves_the_student_towards_the_teacher(
    make_model: Callable[..., LlamaForCausalLM], solver_dir: Path, tmp_path: Path
) -> None:
    model = make_model()
    for parameter in model.parameters():
        parameter.data *= 5  # so that the context changes what the model expects next
    model.save_pretrained(solver_dir)
    config = make_config(solver_dir, tmp_path / "run", steps=30, prompts_per_step=4)
    train(config)
    kl = [line["kl"] for line in JsonLines(tmp_path / "run" / "metrics.jsonl").read()]
    assert sum(kl[-5:]) < 0.7 * sum(kl[:5])


def test_the_same_seed_gives_the_same_numbers(solver_dir: Path, tmp_path: Path) -> None:
    train(make_config(solver_dir, tmp_path / "one"))
    torch.manual_seed(1234)  # what else the process did must not matter
    saved_rng = torch.get_rng_state()
    train(make_config(solver_dir, tmp_path / "two"))
    assert torch.equal(torch.get_rng_state(), saved_rng)
    one, two = (JsonLines(tmp_path / run / "metrics.jsonl").read() for run in ("one", "two"))
    assert [line["loss"] for line in one] == [line["loss"] for line in two]
    train(make_config(solver_dir, tmp_path / "three", seed=4))
    three = JsonLines(tmp_path / "three" / "metrics.jsonl").read()
    assert [line["loss"] for line in one] != [line["loss"] for line in three]


LORA = {"r": 2, "alpha": 4}


@pytest.mark.parametrize("precision", slow_but(["float32"], ["float32", "bfloat16"]))
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "method",
    [
        stepalign(),
        stepalign(teacher={"name": "live"}),
        stepalign(teacher={"name": "ema"}),
        stepalign(teacher={"name": "refreshed", "every": 2}),
        # Nearly every answer of a random model is wrong: only the KL penalty reads those rollouts.
        grpo(kl={}),
    ],
    ids=["base", "live", "ema", "refreshed", "grpo"],
)
def test_stopped_and_resumed_gives_the_same_bits(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, Any],
    adapter: dict[str, Any] | None,
    precision: str,
) -> None:
    common = {
        "method": method,
        "adapter": adapter,
        "precision": precision,
        "max_empty_steps": None,
    }
    torch.manual_seed(0)
    train(make_config(solver_dir, tmp_path / "undisturbed", **common))
    kept = {path.name for path in (tmp_path / "undisturbed" / "checkpoints" / "last").iterdir()}
    follows = method.get("teacher", {"name": None})["name"] in ("ema", "refreshed")
    assert ("teacher.safetensors" in kept) == follows
    assert ("adapter_model.safetensors" in kept) == (adapter is not None)
    assert ("model.safetensors" in kept) == ("tokenizer.json" in kept) == (adapter is None)

    torch.manual_seed(0)
    config = make_config(solver_dir, tmp_path / "stopped", **common)
    interrupt_at_call(monkeypatch, 2)
    stopped = train(config)
    assert (stopped.step, stopped.interrupted) == (2, True)
    # Whatever a killed process left behind in the logs is forgotten.
    log = tmp_path / "stopped" / "metrics.jsonl"
    log.write_text(
        log.read_text()
        + log.read_text().splitlines()[-1].replace('"step": 2', '"step": 3')
        + '\n{"st'
    )
    torch.manual_seed(99)
    assert train(config, resume=True).step == 4
    assert_same_run(tmp_path / "undisturbed", tmp_path / "stopped")


def test_a_finished_run_can_be_lengthened(solver_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    train(make_config(solver_dir, tmp_path / "long"))
    torch.manual_seed(0)
    train(make_config(solver_dir, tmp_path / "short", steps=2))
    train(make_config(solver_dir, tmp_path / "short"), resume=True)
    assert_same_run(tmp_path / "long", tmp_path / "short")


def test_ctrl_c_loses_no_finished_step(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(solver_dir, tmp_path / "run", checkpoint={"every": 100})
    interrupt_at_call(monkeypatch, 3)
    before = signal.getsignal(signal.SIGINT)
    assert train(config).step == 3
    assert signal.getsignal(signal.SIGINT) is before
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    assert state["step"] == 3


def test_a_second_ctrl_c_stops_at_once(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still running")

    monkeypatch.setattr(selfdistill.training.gradients, "score", twice)
    # A test run in the background inherits an ignored SIGINT; a terminal's process has this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(make_config(solver_dir, tmp_path / "run"))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_is_not_overwritten_and_a_foreign_one_not_continued(
    solver_dir: Path, tmp_path: Path
) -> None:
    train(make_config(solver_dir, tmp_path / "run", steps=1))
    with pytest.raises(RunExistsError, match="already holds a run"):
        train(make_config(solver_dir, tmp_path / "run", steps=1))
    with pytest.raises(CheckpointError, match=r"seed \(3 there, 4 here\)"):
        train(make_config(solver_dir, tmp_path / "run", steps=1, seed=4), resume=True)
    assert train(make_config(solver_dir, tmp_path / "run", steps=2), resume=True).step == 2


def test_a_tolerance_on_a_gpu_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    method = {"name": "refsol", "loss": {"gradient_tolerance": 0.1}}
    config = make_config(tmp_path / "nowhere", tmp_path / "run", device="cuda", method=method)
    with pytest.raises(ConfigError, match="gradient_tolerance: a run on cuda"):
        train(config)


def test_a_torn_last_checkpoint_is_refused(solver_dir: Path, tmp_path: Path) -> None:
    config = make_config(solver_dir, tmp_path / "run", steps=2)
    train(config)
    model = tmp_path / "run" / "checkpoints" / "last" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"last is damaged: model\.safetensors"):
        train(config, resume=True)


def test_divergence_stops_before_the_weights_are_ruined(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        scored = score(*args, **kwargs)
        if calls == 2:
            scored.student_hidden.data[0, 0] = torch.nan
        return scored

    monkeypatch.setattr(selfdistill.training.gradients, "score", poisoned)
    with pytest.raises(DivergedError, match=r"step 2: .*nan.*learning_rate"):
        train(make_config(solver_dir, tmp_path / "run"))
    saved = tensors(tmp_path / "run")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    assert len(JsonLines(tmp_path / "run" / "metrics.jsonl").read()) == 1


def test_an_interrupted_evaluation_is_made_up_for(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    # More problems than are sampled at once.
    several = {"evaluation": {"every": 2, "problems": 17, "samples": 1}}
    train(make_config(solver_dir, tmp_path / "undisturbed", **several))
    torch.manual_seed(0)
    config = make_config(solver_dir, tmp_path / "stopped", **several)
    attempt = Solver.attempt
    calls = 0

    def interrupted(self: Solver, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the evaluation after step 2
            os.kill(os.getpid(), signal.SIGINT)
        return attempt(self, **kwargs)

    monkeypatch.setattr(Solver, "attempt", interrupted)
    assert train(config).step == 2
    assert [line["step"] for line in lines(tmp_path / "stopped", "evaluations.jsonl")] == [0]
    assert len(lines(tmp_path / "stopped", "metrics.jsonl")) == 2
    assert train(config, resume=True).step == 4
    assert_same_run(tmp_path / "undisturbed", tmp_path / "stopped")
    kept = [path.name for path in (tmp_path / "stopped" / "checkpoints").glob("step-*")]
    assert len(kept) <= 2


def test_a_full_disk_keeps_the_last_checkpoint(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    train(make_config(solver_dir, tmp_path / "undisturbed"))
    torch.manual_seed(0)
    config = make_config(solver_dir, tmp_path / "full")
    write = TrainedWeights.save
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def refused(self: TrainedWeights, folder: Path, masters: Any) -> None:
        if "step-000003" in folder.name:
            # The system refuses to write beyond this size, as it does when there is no room.
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            write(self, folder, masters)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(TrainedWeights, "save", refused)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*step-000003: .*resume"):
        train(config)
    checkpoints = tmp_path / "full" / "checkpoints"
    assert (checkpoints / "last").resolve().name == "step-000002"
    assert not list(checkpoints.glob(".*"))
    monkeypatch.undo()
    assert train(config, resume=True).step == 4
    assert_same_run(tmp_path / "undisturbed", tmp_path / "full")


def test_an_engine_that_dies_keeps_the_last_checkpoint(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    train(make_config(solver_dir, tmp_path / "undisturbed"))
    torch.manual_seed(0)
    config = make_config(solver_dir, tmp_path / "died")
    generate = TransformersEngine.generate
    calls = 0

    def dying(self: TransformersEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first evaluation, step 1, step 2
            raise ConnectionResetError("the worker is gone")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(TransformersEngine, "generate", dying)
    with pytest.raises(EngineError, match=r"ConnectionResetError: the worker is gone.*--resume"):
        train(config)
    assert (tmp_path / "died" / "checkpoints" / "last").resolve().name == "step-000001"
    assert train(config, resume=True).step == 4
    assert_same_run(tmp_path / "undisturbed", tmp_path / "died")


@pytest.mark.parametrize("teacher", ["ema", "base"])
def test_a_damaged_adapter_or_average_is_refused(
    solver_dir: Path, tmp_path: Path, teacher: str
) -> None:
    config = make_config(
        solver_dir,
        tmp_path / "run",
        steps=1,
        adapter=LORA,
        method=stepalign(teacher={"name": teacher}),
    )
    train(config)
    name = "teacher.safetensors" if teacher == "ema" else "adapter_model.safetensors"
    path = tmp_path / "run" / "checkpoints" / "last" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"last is damaged: {name}"):
        train(config, resume=True)


def test_another_adapter_is_refused(solver_dir: Path, tmp_path: Path) -> None:
    config = make_config(solver_dir, tmp_path / "run", steps=1, adapter=LORA)
    train(config)
    for other in (AdapterConfig(r=4), None):
        with pytest.raises(CheckpointError, match="another configuration: adapter"):
            train(config.model_copy(update={"adapter": other}), resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"task": {"step_counts": [2]}},
        {"task": {"step_counts": [1, 2], "reference_dialect": 3}},
        {"method": stepalign()},
        {"method": refsol(group_size=3)},
        {"method": refsol(teacher={"name": "live"})},
        {"method": refsol(teacher={"name": "ema"})},
        {"method": refsol(teacher={"name": "ema", "decay": 0.5})},
        {"precision": "bfloat16"},
        {"adapter": {}},
        {"adapter": {"r": 2}},
        {"adapter": {"alpha": 64}},
        {"adapter": {"target_modules": ["q_proj"]}},
        {"tokens_per_microbatch": 1},
        {"prompts_per_step": 3},
        {"rollout": {"max_new_tokens": 11}},
        {"rollout": {"max_new_tokens": 12, "temperature": 0.8}},
        {"method": refsol(loss={"objective": {"name": "reverse_kl"}})},
        {"method": refsol(loss={"objective": {"name": "jsd", "beta": 0.4}})},
        {"method": refsol(loss={"advantage_mask": {"threshold": 0.002}})},
        {"method": refsol(loss={"advantage_mask": {"threshold": 0.002, "per_step": True}})},
        {"method": refsol(loss={"advantage_mask": {"top_fraction": 0.5}})},
        {"method": refsol(loss={"objective": {"name": "skew_kl"}})},
        {"method": refsol(loss={"objective": {"name": "skew_reverse_kl"}})},
        {"method": refsol(loss={"temperature": 1.5})},
        {"method": refsol(loss={"reduction": "sequence_mean"})},
        {"method": refsol(loss={"top_k": {"k": 4}})},
        {"method": refsol(loss={"divergence_clip": 1e-4})},
        {"method": refsol(loss={"importance_clip": 0.5})},
        {"method": refsol(loss={"stop_after_first_wrong_step": True})},
        {"method": stepalign(critic={"name": "scribe", "copying": "full_repetition"})},
        {"method": {"name": "environment", "group_size": 2}},
        {"method": {"name": "environment", "group_size": 2, "detail": "step"}},
        {"method": grpo(group_size=2)},
        {"updates_per_step": 2},
        {"optimizer": {"learning_rate": 2e-2, "warmup_steps": 3}},
        {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 4}},
        {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 3, "betas": [0.8, 0.99]}},
        {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 3, "weight_decay": 0.1}},
        {"optimizer": {"learning_rate": 1e-2, "warmup_steps": 3, "max_grad_norm": 1e-8}},
        {"evaluation": {"every": 1, "problems": 3, "samples": 2}},
        {"evaluation": {"every": 2, "problems": 4, "samples": 2}},
        {"evaluation": {"every": 2, "problems": 3, "samples": 3}},
    ],
    ids=lambda change: json.dumps(change)[:70],
)
def test_no_setting_does_nothing(solver_dir: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    runs = []
    # What belongs to one method is compared with that method's default.
    method = {key: value for key, value in change.get("method", {}).items() if key == "name"}
    default: dict[str, Any] = {"steps": 2, "method": {**refsol(), **method}}
    default["max_empty_steps"] = None  # GRPO learns nothing from a random model
    if default["method"] == change.get("method"):
        default["method"] = refsol()
    if change.get("adapter"):
        default["adapter"] = {}
    if "decay" in change.get("method", {}).get("teacher", {}):
        default["method"] = refsol(teacher={"name": "ema"})
    for name, settings in (("default", {}), ("changed", change)):
        train(make_config(solver_dir, tmp_path / name, **{**default, **settings}))
        logs = [lines(tmp_path / name, log) for log in ("metrics.jsonl", "evaluations.jsonl")]
        saved = {name: tensor.tolist() for name, tensor in tensors(tmp_path / name).items()}
        runs.append((logs, saved))
    assert runs[0] != runs[1]


def reward_alternately(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call every second rollout right: a random model earns no reward of its own."""

    def alternating(task: Any, problems: Any, groups: Any) -> list[Attempts]:
        return [
            replace(
                attempt,
                verdicts=[replace(v, correct=i % 2 == 0) for i, v in enumerate(attempt.verdicts)],
            )
            for attempt in judge(task, problems, groups)
        ]

    monkeypatch.setattr(selfdistill.training.loop, "judge", alternating)


@pytest.mark.parametrize(
    ("common", "change"),
    [
        ({}, {"group_size": 2}),
        ({}, {"normalize_std": False}),
        ({}, {"kl": {}}),
        ({"kl": {}}, {"kl": {"coefficient": 0.5}}),
        ({}, {"clip_low": 1e-6}),
        ({}, {"clip_high": 1e-6}),
        ({}, {"updates_per_step": 1}),
    ],
    ids=str,
)
def test_no_setting_of_grpo_does_nothing(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    common: dict[str, Any],
    change: dict[str, Any],
) -> None:
    reward_alternately(monkeypatch)
    runs = []
    for name, settings in (("default", {}), ("changed", change)):
        method = {**grpo(**common), **settings}
        updates = method.pop("updates_per_step", 2)
        train(
            make_config(
                solver_dir, tmp_path / name, steps=2, method=method, updates_per_step=updates
            )
        )
        runs.append({key: value.tolist() for key, value in tensors(tmp_path / name).items()})
    assert runs[0] != runs[1]


def test_grpo_makes_rewarded_rollouts_more_likely(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward is the share of digits: something that a random model can learn at once."""
    shares = []

    def digits(task: Any, problems: Any, groups: Any) -> list[Attempts]:
        attempts = judge(task, problems, groups)
        for attempt in attempts:
            count = [sum(map(str.isdigit, r.text)) / len(r.token_ids) for r in attempt.rollouts]
            middle = sorted(count)[len(count) // 2]
            shares.append(sum(count) / len(count))
            attempt.verdicts[:] = [
                replace(verdict, correct=value >= middle)
                for verdict, value in zip(attempt.verdicts, count, strict=True)
            ]
        return attempts

    monkeypatch.setattr(selfdistill.training.loop, "judge", digits)
    train(make_config(solver_dir, tmp_path / "run", steps=30, method=grpo(group_size=8)))
    assert sum(shares[-10:]) > 1.5 * sum(shares[:10])
    first, *_ = JsonLines(tmp_path / "run" / "metrics.jsonl").read()
    assert first["kl"] is None  # no reference model
    assert (first["tied"], first["dropped"]) == (0, 0)


def test_a_step_without_contrast_changes_nothing(solver_dir: Path, tmp_path: Path) -> None:
    """A random model is always wrong: all rewards of a group are equal."""
    with pytest.raises(NothingLearnedError, match=r"2 of 2 steps .*all rewards of a prompt"):
        train(make_config(solver_dir, tmp_path / "run", steps=2, method=grpo()))
    for line in JsonLines(tmp_path / "run" / "metrics.jsonl").read():
        assert (line["tied"], line["loss"], line["active"], line["grad_norm"]) == (1, 0, 0, 0)
        assert (line["advantage"], line["entropy"], line["packed_tokens"]) == (None, None, 0)
        assert line["tokens"] > 0
    before = load_file(solver_dir / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_whose_rollouts_have_no_context_changes_nothing(
    solver_dir: Path, tmp_path: Path
) -> None:
    """No rollout of a random model succeeds, so none has a successful peer."""
    method = {"name": "peer", "group_size": 3}
    with pytest.raises(NothingLearnedError, match=r"of 12 rollouts 12 had nothing to show"):
        train(make_config(solver_dir, tmp_path / "run", steps=2, method=method))
    for line in JsonLines(tmp_path / "run" / "metrics.jsonl").read():
        assert (line["dropped"], line["tokens"], line["loss"], line["active"]) == (6, 0, 0, 0)
        assert (line["kl"], line["advantage"], line["entropy"]) == (None, None, None)
    before = load_file(solver_dir / "model.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "last" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_peers_teach_each_other(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward_alternately(monkeypatch)
    method = {"name": "peer", "group_size": 2}
    train(make_config(solver_dir, tmp_path / "run", steps=2, method=method))
    for line in JsonLines(tmp_path / "run" / "metrics.jsonl").read():
        assert line["dropped"] == 2  # the successful one of each pair has no successful peer
        assert line["kl"] > 0


def test_rollouts_are_cut_behind_the_first_wrong_step(solver_dir: Path, tmp_path: Path) -> None:
    config = make_config(
        solver_dir,
        tmp_path,
        task={"step_counts": [3]},
        method=refsol(loss={"stop_after_first_wrong_step": True}),
    )
    solver = load_solver(config)
    (problem,) = solver.task.problems(split="train", count=1)
    one, two, three, answer = problem.reference.replace(" <", "|<").split("|")
    wrong_two = f"{two[:-2]}{(int(two[-2:]) + 1) % 100:02d}"
    rollouts = []
    for text in (problem.reference, f"{one} {wrong_two} {three} {answer}"):
        ids = solver.tokenizer(text, add_special_tokens=False)["input_ids"]
        rollouts.append(Rollout(ids, [-float(i) for i in range(len(ids))], text, False))
    (whole,) = judge(solver.task, [problem], [rollouts])
    (cut,) = selfdistill.training.batch.cut_rollouts(solver.tokenizer, [whole])
    assert cut.rollouts[0] == rollouts[0]
    kept = cut.rollouts[1].token_ids
    assert solver.tokenizer.decode(kept) == f"{one} {wrong_two}"
    assert cut.rollouts[1].logprobs == [-float(i) for i in range(len(kept))]
    contexts = [[None, None]]
    for stops in (False, True):
        loss = LossConfig(stop_after_first_wrong_step=stops)
        method = replace(solver.build_method(RefSolMethod(loss=loss)), needs_context=False)
        batch = selfdistill.training.batch.build_batch(
            solver, method, [whole], contexts, too_long="error"
        )
        assert batch.groups[0].completions[1] == (kept if stops else rollouts[1].token_ids)


def test_seeds_of_different_uses_differ() -> None:
    seeds = {
        derive_seed(seed, use, step)
        for seed in range(3)
        for use in ("rollout", "evaluate")
        for step in range(50)
    }
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_family_that_cannot_share_is_refused_before_training(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(model: torch.nn.Module, *, backend: str) -> None:
        asked.append(backend)
        raise UnsupportedModelError("MambaForCausalLM cannot share prefixes")

    monkeypatch.setattr(selfdistill.training.loop, "enable_prefix_sharing", refuse)
    config = make_config(solver_dir, tmp_path / "run", attention="loop")
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        train(config)
    assert asked == ["loop"]
    assert not (tmp_path / "run").exists()


def test_an_attention_that_cannot_run_is_refused_before_training(
    solver_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnavailableBackendError, match=r"flash cannot run: .* need a GPU"):
        train(make_config(solver_dir, tmp_path / "run", attention="flash"))
    assert not (tmp_path / "run").exists()


def jsonl_task(folder: Path, solver_dir: Path, *, count: int = 6) -> dict[str, Any]:
    """Return a task of arithmetic questions in files, in the arithmetic tokenizer's own words."""
    task = ArithmeticTask(step_counts=(1, 2))
    splits = {}
    for split in ("train", "dev"):
        path = folder / f"{split}.jsonl"
        problems = task.problems(split=split, count=count)
        path.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in problems))
        splits[split] = str(path)
    return {
        "name": "jsonl",
        "splits": splits,
        "id": "id",
        "reference": "reference",
        "instruction": "",
        "checker": "plain",
    }


def test_a_task_of_files_is_trained_on_for_epochs(solver_dir: Path, tmp_path: Path) -> None:
    task = jsonl_task(tmp_path, solver_dir, count=3)
    config = make_config(
        solver_dir, tmp_path / "run", task=task, method=refsol(), steps=4, prompts_per_step=2
    )
    assert train(config).step == 4  # 8 problems of 3 different ones
    longer = config.model_copy(update={"output_dir": tmp_path / "whole"})
    train(longer.model_copy(update={"steps": 2}))
    train(longer, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_answers_that_the_checker_leaves_undecided_are_counted(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OutOfTime(PlainChecker):
        def decide(
            self, pairs: Sequence[tuple[str, str]], *, seconds: float | None = None
        ) -> list[bool | None]:
            assert seconds == 7.0
            return [None] * len(pairs)

    monkeypatch.setattr("selfdistill.tasks.dataset.build_checker", lambda name: OutOfTime())
    monkeypatch.setattr("selfdistill.tasks.dataset.read_answer", lambda response, forms: "x")
    task = {**jsonl_task(tmp_path, solver_dir), "checker_seconds": 7.0}
    train(make_config(solver_dir, tmp_path / "run", task=task, method=refsol(), steps=1))
    (metrics,) = JsonLines(tmp_path / "run" / "metrics.jsonl").read()
    assert (metrics["undecided"], metrics["reward"]) == (4, 0.0)
    evaluations = JsonLines(tmp_path / "run" / "evaluations.jsonl").read()
    assert [line["undecided"] for line in evaluations] == [6, 6]


def test_what_is_too_long_stops_the_run_or_is_counted(solver_dir: Path, tmp_path: Path) -> None:
    def run(name: str, **prompt: Any) -> list[dict[str, Any]]:
        settings = make_config(
            solver_dir,
            tmp_path / name,
            prompt=prompt,
            method=refsol(group_size=2),
            task={"step_counts": [1, 4]},
            steps=3,
            prompts_per_step=4,
            evaluation={"every": 9, "problems": 1, "samples": 1},
        )
        train(settings)
        return JsonLines(tmp_path / name / "metrics.jsonl").read()

    free = run("free", too_long="drop")
    assert [line["too_long"] for line in free] == [0, 0, 0]
    # A teacher's prompt has 25 tokens for questions of one operation, 58 for those of four.
    with pytest.raises(PromptTooLongError, match="teacher prompt"):
        run("error", max_length=50)
    dropped = run("drop", max_length=50, too_long="drop")
    # Of the 4 problems of each step, times 2 rollouts; nothing is left of the second step.
    assert [line["too_long"] for line in dropped] == [6, 8, 4]
    assert 0 < dropped[0]["tokens"] < free[0]["tokens"]
    assert (dropped[1]["tokens"], dropped[1]["loss"]) == (0, 0)
    with pytest.raises(TaskError, match="1 of 1 problems leave no room for 12 new tokens"):
        run("none", max_length=13, too_long="drop")
