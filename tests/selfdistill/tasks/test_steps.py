from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from selfdistill.tasks.steps import (
    STEP_INSTRUCTION,
    StepSpan,
    follows_format,
    read_answer,
    split_steps,
    token_ends,
    token_step_ids,
)

RESPONSE = "<step_1> 2 + 3 = 5 <step_2> 5 + 1 = 6 <answer> 6"


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: one token a byte, and an end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{byte: i for i, byte in enumerate(alphabet, start=1)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_a_step_ends_where_the_next_begins() -> None:
    steps = split_steps(RESPONSE)
    assert [step.number for step in steps] == [1, 2, None]
    pieces = [RESPONSE[step.start : step.stop] for step in steps]
    assert pieces == ["<step_1> 2 + 3 = 5 ", "<step_2> 5 + 1 = 6 ", "<answer> 6"]
    assert split_steps("no tag at all") == []
    closed = "Well. <step_1>a</step_1>\n<answer>1</answer>"
    assert split_steps(closed) == [StepSpan(1, 6, 25), StepSpan(None, 25, len(closed))]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (RESPONSE, "6"),
        ("<answer>6</answer>", "6"),
        ("<answer>\n 6\nBecause I said so.", "6"),
        ("<answer> 5 <answer> 6", "6"),
        (r"<answer> \boxed{6}", r"\boxed{6}"),
        (r"so \boxed{5}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{5} <answer>", None),
        (r"\boxed{\frac{1}{2}", None),
        ("6", None),
        ("", None),
    ],
)
def test_the_answer_is_read_from_its_tag_or_box(response: str, answer: str | None) -> None:
    assert read_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "follows"),
    [
        (RESPONSE, True),
        ("<step_1>a</step_1><answer>1</answer>", True),
        ("<step_2> a <answer> 1", False),
        ("<step_1> a <step_1> b <answer> 1", False),
        ("<step_1> a <answer> 1 <step_2> b", False),
        ("Sure! <step_1> a <answer> 1", False),
        ("<answer> 1", False),
        ("", False),
    ],
)
def test_the_format_asks_for_steps_in_order_and_one_answer(response: str, follows: bool) -> None:
    assert follows_format(response) == follows


def test_the_instruction_names_every_tag() -> None:
    assert [step.number for step in split_steps(STEP_INSTRUCTION)] == [1, 2, None]


def test_every_token_knows_its_step(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Hé! <step_1> è <step_2> \N{GRINNING FACE}b <answer> 6"
    ids = byte_tokenizer(text)["input_ids"]
    steps = token_step_ids(byte_tokenizer, [*ids, byte_tokenizer.eos_token_id])
    for step, piece in enumerate(["<step_1> è ", "<step_2> \N{GRINNING FACE}b ", "<answer> 6"]):
        inside = [token for token, of in zip(ids, steps, strict=False) if of == step]
        # The bytes of an unfinished character belong to no step, its last byte does.
        whole = byte_tokenizer(piece)["input_ids"]
        characters = len(piece)
        assert len(inside) == characters
        assert inside[:9] == whole[:9]
    assert set(steps[: len("Hé! ") + 1]) == {-1}
    assert steps[-1] == -1
    assert len(steps) == len(ids) + 1


def test_token_ends_are_those_of_the_decoded_text(
    byte_tokenizer: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    for chosen, text in [
        (byte_tokenizer, "aé\N{GRINNING FACE}b"),
        (tokenizer, "so 12 + 3 = 15"),
    ]:
        ids = chosen(text)["input_ids"]
        decoded = chosen.decode(ids, skip_special_tokens=True)
        ends = token_ends(chosen, ids)
        assert ends[-1] == len(decoded)
        for i, end in enumerate(ends, start=1):
            so_far = chosen.decode(ids[:i], skip_special_tokens=True).rstrip("\ufffd")
            assert decoded[:end] == so_far
    cut = byte_tokenizer("aé")["input_ids"][:-1]  # ends within a character
    assert len(token_ends(byte_tokenizer, cut)) == len(cut)
