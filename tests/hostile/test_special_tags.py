"""Vocabularies in which the tags of answers, steps and thoughts are special tokens."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_tokenizers import byte_level
from transformers import PreTrainedTokenizerBase

from selfdistill.analysis.tokens import erroneous_attempts
from selfdistill.config import Config, VLLMSettings
from selfdistill.critic.llm import LLMCritic
from selfdistill.critic.textgen.local import LocalGenerator
from selfdistill.prompts.chat import ChatTemplate
from selfdistill.rollout.engine import Rollout, SamplingParams, make_rollout
from selfdistill.rollout.spans import token_span
from selfdistill.rollout.vllm_engine import VLLMEngine
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.tasks.interface import Problem, Verdict, check_all
from selfdistill.training.solver import load_solver

SOLVER = Path(__file__).resolve().parents[2] / "examples" / "arithmetic" / "solver"
TASK = ArithmeticTask()
TEXT = "now <step_1> now 47 plus 8 makes 55 <answer> 55"
PROBLEM = Problem("p", "47 + 8 mod 100", "55", "")


def special_tags() -> PreTrainedTokenizerBase:
    """The arithmetic tokenizer, with its tags as special tokens; the ids stay the same."""
    tokenizer = build_tokenizer()
    tags = [word for word in tokenizer.get_vocab() if word.startswith("<")]
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(tags)})
    assert len(tokenizer) == len(build_tokenizer())
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def judge(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[Rollout, Verdict]:
    rollout = make_rollout(ids, [0.0] * len(ids), tokenizer, [tokenizer.eos_token_id])
    return rollout, TASK.check(PROBLEM, rollout.text)


class Scripted:
    """An engine that says what it is told to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
        self._rollout = make_rollout(ids, [0.0] * len(ids), tokenizer, [ids[-1]])

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        return [[self._rollout] * group_size for _ in prompts]

    def wait_for_group(self) -> None:
        pass

    def sync(self, model: object) -> None:
        raise AssertionError("nothing is trained here")


def test_a_right_rollout_is_right_and_a_wrong_step_is_found() -> None:
    tokenizer = special_tags()
    rollout, verdict = judge(tokenizer, encode(tokenizer, TEXT))
    assert rollout.text == TEXT
    assert rollout.finished
    assert verdict.answer == "55"
    assert verdict.correct
    plain = build_tokenizer()
    for ids in (encode(plain, TEXT.replace("makes 55", "makes 56")), encode(plain, TEXT)[:-4]):
        (expected, judged), (rollout, verdict) = judge(plain, ids), judge(tokenizer, ids)
        assert (rollout, verdict) == (expected, judged)
        span = token_span(tokenizer, rollout, verdict.wrong_span)
        assert span == token_span(plain, expected, judged.wrong_span)


def test_only_the_token_that_ended_a_rollout_is_left_out() -> None:
    tokenizer = special_tags()
    ids, end = encode(tokenizer, TEXT), tokenizer.eos_token_id
    pad, user = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<user>")
    for tokens, expected in {
        (end,): "",
        (pad, end): "<pad>",
        (ids[0], user, end): "now <user>",
        (ids[0], user): "now <user>",
        (ids[0], pad, pad): "now <pad> <pad>",
    }.items():
        rollout = make_rollout(list(tokens), [0.0] * len(tokens), tokenizer, [end])
        assert rollout.text == expected
    # Any of several end tokens.
    assert make_rollout([ids[0], user], [0.0] * 2, tokenizer, [end, user]).text == "now"


def test_the_solver_is_as_good_with_special_tags(tmp_path: Path) -> None:
    """What evaluation, training, filter and analysis read, by the transformers engine."""
    folder = tmp_path / "solver"
    shutil.copytree(SOLVER, folder)
    special_tags().save_pretrained(folder)
    results = []
    for model in (SOLVER, folder):
        solver = load_solver(Config(model=str(model), output_dir=tmp_path / "run"))
        results.append(solver.attempt(split="dev", problems=6, samples=4, seed=1))
    plain, special = results
    assert [group.rollouts for group in special] == [group.rollouts for group in plain]
    assert [group.verdicts for group in special] == [group.verdicts for group in plain]
    assert any(verdict.correct for group in special for verdict in group.verdicts)
    assert erroneous_attempts(special, limit=99) == erroneous_attempts(plain, limit=99)


def test_the_vllm_engine_reads_the_same_text() -> None:
    tokenizer = special_tags()
    engine = VLLMEngine(str(SOLVER), tokenizer, VLLMSettings())  # not started
    ids = encode(tokenizer, TEXT)
    logprobs = [{token: SimpleNamespace(logprob=-1.0)} for token in ids]
    output = SimpleNamespace(token_ids=tuple(ids), logprobs=logprobs)
    assert engine._rollout(output).text == TEXT


@pytest.mark.parametrize("thoughts", ["", "<think>D, I think: <case></think>"])
def test_a_critic_whose_form_is_special_tokens_is_understood(thoughts: str) -> None:
    """Without its tags a critique had no form, and its thoughts ran into its answer."""
    tokenizer = byte_level()
    tags = ["case", "first_change", "text", "think"]
    forms = [form for tag in tags for form in (f"<{tag}>", f"</{tag}>")]
    tokenizer.add_special_tokens({"additional_special_tokens": forms})
    answer = f"{thoughts}<case>D</case><first_change>1</first_change><text>{TEXT}</text>"
    engine = Scripted(tokenizer, encode(tokenizer, answer))
    generator = LocalGenerator(
        engine, ChatTemplate(tokenizer), max_new_tokens=64, max_length=None, identity="it"
    )
    (critique,) = LLMCritic(generator, check=partial(check_all, TASK)).critique(
        [PROBLEM], ["so 56"]
    )
    assert critique is not None
    assert critique.text == TEXT
