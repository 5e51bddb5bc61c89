from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from selfdistill.rollout.engine import Rollout
from selfdistill.rollout.spans import token_span, token_steps
from selfdistill.tasks.arithmetic import ArithmeticTask

TEXT = "now <step_1> now 47 plus 8 makes 55 <answer> 55"


def rollout(tokenizer: PreTrainedTokenizerBase) -> Rollout:
    ids = [*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Rollout(ids, [0.0] * len(ids), TEXT, True)


def test_every_token_finds_its_step(tokenizer: PreTrainedTokenizerBase) -> None:
    spans = ArithmeticTask().step_spans(TEXT)
    assert [TEXT[slice(*span)] for span in spans] == TEXT.replace(" <", "|<").split("|")
    # now | <step_1> now 4 7 plus 8 makes 5 5 | <answer> 5 5 | <eos>
    expected = [0] + [1] * 9 + [2] * 3 + [-1]
    assert token_steps(tokenizer, rollout(tokenizer), spans) == expected


def test_a_step_without_tokens_is_not_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    spans = [(0, 0), (4, 35)]
    assert token_steps(tokenizer, rollout(tokenizer), spans) == [-1] + [0] * 9 + [-1] * 4


def test_spans_are_whole_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    own = rollout(tokenizer)
    for span, expected in {
        (0, 3): (0, 1),
        (6, 14): (1, 3),  # the middle of a tag, and a part of the next word
        (36, 47): (10, 13),  # up to the end, which the end-of-sequence token is no part of
        (36, 99): (10, 14),
        (99, 120): None,
    }.items():
        assert token_span(tokenizer, own, span) == expected
