"""The vLLM engine with the real vLLM: tiny random models, float32, on a CPU or a GPU."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import vllm_models
from transformers import LlamaForCausalLM
from vllm_models import TOKENIZER, moved, save, tiny

from selfdistill.config import Config, TransformersTextEngine, VLLMEngineConfig, VLLMTextEngine
from selfdistill.critic.textgen.build import build_text_generator
from selfdistill.model.lm_head import find_lm_head
from selfdistill.rollout.engine import EngineError, Rollout, SamplingParams
from selfdistill.rollout.vllm_engine import VLLMEngine
from selfdistill.training.agreement import (
    EngineMismatchError,
    check_agreement,
    with_own_logprobs,
)
from selfdistill.training.loop import train

# `make test-vllm` is for these tests: there a vLLM that cannot be imported fails them.
if os.environ.get("SELFDISTILL_REQUIRE_VLLM") != "1":
    pytest.importorskip(
        "vllm",
        reason="needs vllm: make test-vllm; with a GPU also pip install vllm",
    )

SETTINGS = VLLMEngineConfig(dtype="float32", max_length=256, kv_cache_gib=0.125, enforce_eager=True)
# The first prompt fills a whole cache block of 32 tokens.
PROMPTS = [[1, 4, *[9, 10, 11, 12] * 10, 5], [1, 4, 8, 5], [1, 4, 7, 13, 14, 5]]
PARAMS = SamplingParams(temperature=1.3, max_new_tokens=16, seed=3)
# What training allows a float32 engine. Log-probs reach 15 or so; each of two layers and the head
# rounds them by 1e-6, in vLLM's kernels and in torch's, and nothing else may differ. Weights that
# were not handed over differ by 1e-2 and more.
NATS = 1e-4


def disagreement(model: Any, groups: list[list[Rollout]]) -> float:
    """The largest difference from the log-probs of a plain forward pass in float32."""
    return vllm_models.disagreement(model, PROMPTS, groups, PARAMS.temperature)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LlamaForCausalLM, VLLMEngine]:
    """A model that is trained whole and its engine; both change from test to test."""
    model = tiny(tied=request.param, seed=0)
    folder = tmp_path_factory.mktemp("model")
    return model, VLLMEngine(save(model, folder), TOKENIZER, SETTINGS)


def test_token_ids_and_logprobs_are_those_of_the_model(
    whole: tuple[LlamaForCausalLM, VLLMEngine],
) -> None:
    model, engine = whole
    engine.sync(model)
    state = torch.get_rng_state()
    groups = engine.generate(PROMPTS, group_size=4, params=PARAMS)
    assert torch.equal(torch.get_rng_state(), state)
    assert disagreement(model, groups) < NATS
    # Two passes of one model, packed and not.
    assert check_agreement(
        model,
        find_lm_head(model),
        PROMPTS,
        groups,
        params=SamplingParams(temperature=1.3),
        tolerance=NATS,
    ) == pytest.approx(disagreement(model, groups), abs=NATS / 5)
    rollouts = [rollout for group in groups for rollout in group]
    assert len({tuple(rollout.token_ids) for rollout in rollouts}) == len(rollouts)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert TOKENIZER.eos_token_id not in rollout.token_ids[:-1]
        assert rollout.finished == (rollout.token_ids[-1] == TOKENIZER.eos_token_id)
        assert rollout.finished or len(rollout.token_ids) == 16
        words = rollout.token_ids[:-1] if rollout.finished else rollout.token_ids
        assert rollout.text == (TOKENIZER.decode(words) if words else "")


def test_a_seed_decides_and_prompts_share_whole_blocks(
    whole: tuple[LlamaForCausalLM, VLLMEngine],
) -> None:
    _, engine = whole
    first = engine.generate(PROMPTS, group_size=2, params=PARAMS)
    assert engine.generate(PROMPTS, group_size=2, params=PARAMS) == first
    other = SamplingParams(temperature=1.3, max_new_tokens=16, seed=4)
    assert engine.generate(PROMPTS, group_size=2, params=other) != first
    # Prompt i draws from the stream of seed + i, whatever else is asked for in the same call.
    rest = engine.generate(PROMPTS[1:], group_size=2, params=replace(PARAMS, seed=4))
    assert [[r.token_ids for r in group] for group in rest] == [
        [r.token_ids for r in group] for group in first[1:]
    ]
    # The streams of neighbouring seeds share no rollout, as vLLM's own with n > 1 would.
    same = engine.generate([PROMPTS[1]] * 2, group_size=4, params=PARAMS)
    assert len({tuple(rollout.token_ids) for group in same for rollout in group}) == 8
    (output,) = engine._llm.generate([{"prompt_token_ids": PROMPTS[0]}], use_tqdm=False)
    assert output.num_cached_tokens == 32
    greedy = SamplingParams(temperature=0.0, max_new_tokens=4)
    ((a, b), *_) = engine.generate(PROMPTS, group_size=2, params=greedy)
    assert a.token_ids == b.token_ids


def test_sampling_follows_the_distribution_after_the_temperature(
    whole: tuple[LlamaForCausalLM, VLLMEngine],
) -> None:
    model, engine = whole
    engine.sync(model)
    params = SamplingParams(temperature=0.7, max_new_tokens=1, seed=0)
    (group,) = engine.generate(PROMPTS[1:2], group_size=1000, params=params)
    drawn = torch.tensor([r.token_ids[0] for r in group])
    with torch.no_grad():
        expected = (model(torch.tensor(PROMPTS[1:2])).logits[0, -1] / 0.7).softmax(-1)
    share = torch.bincount(drawn, minlength=len(TOKENIZER)) / 1000
    assert (share - expected).abs().max() < 5 * 0.5 / 1000**0.5


def test_all_weights_are_handed_over(whole: tuple[LlamaForCausalLM, VLLMEngine]) -> None:
    model, engine = whole
    for _ in range(3):
        stale = engine.generate(PROMPTS, group_size=2, params=PARAMS)
        moved(model, 0.05)
        with pytest.raises(EngineMismatchError, match="other weights"):
            check_agreement(
                model,
                find_lm_head(model),
                PROMPTS,
                stale,
                params=SamplingParams(temperature=1.3),
                tolerance=NATS,
            )
        engine.sync(model)
        fresh = engine.generate(PROMPTS, group_size=2, params=PARAMS)
        assert disagreement(model, fresh) < NATS


@pytest.mark.parametrize("same", [True, False], ids=["the same tensor twice", "two tensors"])
def test_a_file_with_a_head_counts_more_than_a_config_that_ties_it(
    tmp_path: Path, same: bool
) -> None:
    """transformers and vLLM tie the two where they are equal, and leave them apart otherwise."""
    source = tiny(tied=False, seed=4)
    if same:
        source.lm_head.weight.data.copy_(source.model.embed_tokens.weight)
    save(source, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == same
    engine = VLLMEngine(str(tmp_path), TOKENIZER, SETTINGS)
    for _ in range(3):
        assert disagreement(model, engine.generate(PROMPTS, group_size=2, params=PARAMS)) < NATS
        moved(model, 0.05)
        engine.sync(model)


def test_an_adapter_is_handed_over(tmp_path: Path) -> None:
    base = tiny(tied=True, seed=1)
    engine = VLLMEngine(save(base, tmp_path), TOKENIZER, SETTINGS, adapter_rank=5)
    lora = peft.LoraConfig(
        r=5, lora_alpha=10, target_modules=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
    )
    model = peft.get_peft_model(base, lora)
    before = engine.generate(PROMPTS, group_size=2, params=PARAMS)
    assert disagreement(model, before) < NATS
    for _ in range(3):
        moved(model, 0.05)
        assert disagreement(model, before) > 1e-2
        engine.sync(model)
        before = engine.generate(PROMPTS, group_size=2, params=PARAMS)
        assert disagreement(model, before) < NATS
    with pytest.raises(ValueError, match="lacks a PEFT adapter"):
        engine.sync(base.__class__(base.config))


def test_a_critic_answers_the_same_from_either_engine(tmp_path: Path) -> None:
    prompts = ["4 + 7", "3 - 1 mod 100", "9"]
    shared = {"model": save(tiny(tied=False, seed=3), tmp_path), "max_new_tokens": 8}
    shared["dtype"] = "float32"
    engine = SETTINGS.model_dump(include={"max_length", "kv_cache_gib", "enforce_eager"})
    by_vllm = build_text_generator(VLLMTextEngine(**shared, **engine), device="cpu")
    by_transformers = build_text_generator(TransformersTextEngine(**shared), device="cpu")
    answers = dict(by_vllm.generate(prompts))
    assert answers == dict(by_transformers.generate(prompts))
    assert len(answers) == 3
    assert by_vllm.identity != by_transformers.identity


def test_a_dead_engine_says_what_it_was_doing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(tied=True, seed=2)
    engine = VLLMEngine(save(model, tmp_path), TOKENIZER, SETTINGS)
    model.peft_config = {}
    with pytest.raises(ValueError, match="has a PEFT adapter"):
        engine.sync(model)
    del model.peft_config
    engine.generate(PROMPTS, group_size=1, params=PARAMS)

    def crash(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._llm, "generate", crash)
    with pytest.raises(EngineError, match=r"failed while sampling: .*out of memory.*--resume"):
        engine.generate(PROMPTS, group_size=1, params=PARAMS)
    monkeypatch.setattr(engine._llm, "collective_rpc", crash)
    with pytest.raises(EngineError, match="while taking over the student's weights"):
        engine.sync(model)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [([], PARAMS, "is empty"), ([1] * 250, PARAMS, "256 positions")],
)
def test_bad_input_is_named_before_the_engine_starts(
    tmp_path: Path, prompt: list[int], params: SamplingParams, message: str
) -> None:
    engine = VLLMEngine(save(tiny(tied=True, seed=0), tmp_path), TOKENIZER, SETTINGS)
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt], group_size=1, params=params)
    assert "_llm" not in vars(engine)


def test_a_training_run_checks_its_engine_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selfdistill.runlog import JsonLines

    def config(steps: int, name: str) -> Config:
        return Config.model_validate(
            {
                "model": str(tmp_path / "model"),
                "output_dir": str(tmp_path / name),
                "device": "cpu",
                "steps": steps,
                "prompts_per_step": 2,
                "method": {"name": "stepalign", "group_size": 2},
                "rollout": {"max_new_tokens": 16, "engine": SETTINGS.model_dump()},
                "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
                "evaluation": {"every": 100, "problems": 2, "samples": 1},
            }
        )

    save(tiny(tied=True, seed=0), tmp_path / "model")
    train(config(2, "run"))
    train(config(4, "run"), resume=True)
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl").read()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["engine_disagreement"] < NATS for line in lines)

    # The same run without the hand-over: the second step must not learn from stale rollouts.
    monkeypatch.setattr(VLLMEngine, "sync", lambda self, model: None)
    with pytest.raises(EngineMismatchError):
        train(config(2, "stale"))
    assert len(JsonLines(tmp_path / "stale" / "metrics.jsonl").read()) == 1
    assert (tmp_path / "stale" / "checkpoints" / "last" / "state.json").is_file()


@pytest.mark.parametrize(
    "cut", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.4}, {"top_k": 20, "top_p": 0.9}], ids=str
)
def test_what_is_cut_off_is_never_sampled_and_ratios_are_one(
    whole: tuple[LlamaForCausalLM, VLLMEngine], cut: dict[str, Any]
) -> None:
    model, engine = whole
    engine.sync(model)
    params = replace(PARAMS, **cut)
    groups = engine.generate(PROMPTS, group_size=4, params=params)
    head = find_lm_head(model)
    assert check_agreement(model, head, PROMPTS, groups, params=params, tolerance=NATS) <= NATS
    known = with_own_logprobs(model, head, PROMPTS, groups, temperature=params.temperature)
    policies = [
        [replace(rollout, logprobs=rollout.policy_logprobs) for rollout in group] for group in known
    ]
    assert disagreement(model, policies) < NATS
    assert min(share for group in known for r in group for share in r.log_kept or []) < -0.01


def test_a_stop_string_ends_a_completion(whole: tuple[LlamaForCausalLM, VLLMEngine]) -> None:
    _, engine = whole
    free = engine.generate(PROMPTS, group_size=4, params=PARAMS)
    text = max((rollout.text for group in free for rollout in group), key=len)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = engine.generate(PROMPTS, group_size=4, params=replace(PARAMS, stop=(stop,)))
    pairs = [
        (a, b)
        for one, two in zip(free, stopped, strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    for whole_one, rollout in pairs:
        if stop in whole_one.text:
            assert rollout.finished
            assert rollout.token_ids == whole_one.token_ids[: len(rollout.token_ids)]
            assert rollout.text.rstrip().endswith(stop.rstrip()) or stop in rollout.text
