from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exactness import assert_no_worse_than_torch
from padded_step import in_float64
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from selfdistill.rollout.engine import Rollout, SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine

ModelFactory = Callable[..., LlamaForCausalLM]
PROMPTS = [[1, 4, 9, 10, 11, 12, 5], [1, 4, 8, 5], [1, 4, 7, 13, 14, 5]]


def never_ends(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Make the end-of-sequence token impossible."""
    model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(
            -1, torch.tensor([model.config.eos_token_id]), -torch.inf
        )
    )
    return model


@torch.no_grad()
def own_logprobs(
    model: LlamaForCausalLM, prompt: list[int], rollout: Rollout, *, temperature: float
) -> torch.Tensor:
    logits = model(torch.tensor([prompt + rollout.token_ids])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]


def test_logprobs_equal_an_unpadded_forward(
    make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model()
    params = SamplingParams(temperature=1.3, max_new_tokens=40, seed=3)
    groups = TransformersEngine(model, tokenizer).generate(PROMPTS, group_size=3, params=params)
    lengths = set()
    for prompt, group in zip(PROMPTS, groups, strict=True):
        assert len(group) == 3
        for rollout in group:
            torchs, exact = (
                own_logprobs(own, prompt, rollout, temperature=1.3)
                for own in (model, in_float64(model))
            )
            assert_no_worse_than_torch("log-probs", torch.tensor(rollout.logprobs), torchs, exact)
            lengths.add(len(rollout.token_ids))
    assert len(lengths) > 2  # rows did leave the batch at different times


def test_a_seed_decides_whatever_else_draws(
    make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = TransformersEngine(make_model(), tokenizer)
    params = SamplingParams(max_new_tokens=12, seed=5)
    first = engine.generate(PROMPTS, group_size=2, params=params)
    torch.rand(100)
    state = torch.get_rng_state()
    assert engine.generate(PROMPTS, group_size=2, params=params) == first
    assert torch.equal(torch.get_rng_state(), state)
    other = engine.generate(PROMPTS, group_size=2, params=SamplingParams(max_new_tokens=12, seed=6))
    assert other != first


def test_a_prompts_rollouts_do_not_depend_on_the_others(
    make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model()

    def ids(engine: TransformersEngine, first: int, stop: int) -> list[list[list[int]]]:
        params = SamplingParams(max_new_tokens=12, seed=5 + first)
        groups = engine.generate(PROMPTS[first:stop], group_size=2, params=params)
        return [[rollout.token_ids for rollout in group] for group in groups]

    engine = TransformersEngine(model, tokenizer)
    together = ids(engine, 0, 3)
    assert ids(engine, 0, 1) + ids(engine, 1, 3) == together
    assert ids(TransformersEngine(model, tokenizer, batch_size=2), 0, 3) == together
    assert together[0][0] != together[0][1]  # the rollouts of one prompt differ


def test_sampling_follows_the_distribution(
    make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model()
    params = SamplingParams(temperature=0.7, max_new_tokens=1, seed=0)
    (group,) = TransformersEngine(model, tokenizer).generate(
        [PROMPTS[0]], group_size=20_000, params=params
    )
    counts = torch.bincount(torch.tensor([r.token_ids[0] for r in group]), minlength=len(tokenizer))
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7).softmax(-1)
    assert (counts / 20_000 - expected).abs().max() < 5 * 0.5 / 20_000**0.5


def test_temperature_0_takes_the_likeliest_token(
    make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model()
    params = SamplingParams(temperature=0.0, max_new_tokens=6)
    (group,) = TransformersEngine(model, tokenizer).generate(
        [PROMPTS[0]], group_size=2, params=params
    )
    ids = torch.tensor([PROMPTS[0] + group[0].token_ids])
    with torch.no_grad():
        torchs, exact = (
            own(ids).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
            for own in (model, in_float64(model))
        )
    for rollout in group:
        assert rollout.token_ids == exact.argmax(-1).tolist()
        logprobs = torch.tensor(rollout.logprobs)
        assert_no_worse_than_torch("log-probs", logprobs, torchs.amax(-1), exact.amax(-1))


def test_completions_end_with_eos_or_at_the_limit(
    make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    params = SamplingParams(max_new_tokens=40, seed=0)
    groups = TransformersEngine(make_model(), tokenizer).generate(
        PROMPTS, group_size=8, params=params
    )
    rollouts = [rollout for group in groups for rollout in group]
    assert any(rollout.finished for rollout in rollouts)
    for rollout in rollouts:
        assert tokenizer.eos_token_id not in rollout.token_ids[:-1]
        assert rollout.finished == (rollout.token_ids[-1] == tokenizer.eos_token_id)
        assert rollout.finished or len(rollout.token_ids) == 40
        words = rollout.token_ids[:-1] if rollout.finished else rollout.token_ids
        assert rollout.text == (tokenizer.decode(words) if words else "")
    (group,) = TransformersEngine(never_ends(make_model()), tokenizer).generate(
        [PROMPTS[0]], group_size=4, params=SamplingParams(max_new_tokens=9)
    )
    assert [(len(r.token_ids), r.finished) for r in group] == [(9, False)] * 4


def test_batches_hold_whole_groups_and_training_mode_is_restored(
    make_model: ModelFactory, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model().train()
    rows = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    engine = TransformersEngine(model, tokenizer, batch_size=4)
    groups = engine.generate(PROMPTS, group_size=2, params=SamplingParams(max_new_tokens=3))
    assert [len(group) for group in groups] == [2, 2, 2]
    assert max(rows) <= 4
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "group_size", "params", "message"),
    [
        ([[1], []], 1, SamplingParams(max_new_tokens=9), r"prompts\[1\] is empty"),
        ([[1] * 200], 1, SamplingParams(max_new_tokens=57), "256 positions"),
        ([[1]], 0, SamplingParams(), "group_size"),
        ([[1]], 1, SamplingParams(temperature=-0.1), "temperature"),
        ([[1]], 1, SamplingParams(max_new_tokens=0), "max_new_tokens"),
    ],
)
def test_bad_input_is_named(
    make_model: ModelFactory,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    group_size: int,
    params: SamplingParams,
    message: str,
) -> None:
    engine = TransformersEngine(make_model(), tokenizer)
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, group_size=group_size, params=params)
