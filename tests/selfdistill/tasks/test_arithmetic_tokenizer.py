"""The solver's tokenizer: readable text, exact round trips, one chat layout."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer, vocabulary
from selfdistill.tasks.arithmetic.traces import DIALECTS

TOKENIZER = build_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("dialect", range(len(DIALECTS)))
def test_traces_survive_encoding_and_decoding(dialect: int) -> None:
    for problem in ArithmeticTask(reference_dialect=dialect).problems(split="dev", count=10):
        for text in (problem.question, problem.reference):
            ids = encode(text)
            assert TOKENIZER.unk_token_id not in ids
            assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_any_sampled_ids_encode_back_from_their_text() -> None:
    rng = random.Random(0)
    special = set(TOKENIZER.all_special_ids)
    ordinary = [index for index in range(len(TOKENIZER)) if index not in special]
    for _ in range(100):
        ids = rng.choices(ordinary, k=30)
        text = TOKENIZER.decode(ids, skip_special_tokens=True)
        again = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
        assert again["input_ids"] == ids
        pieces = [text[start:stop] for start, stop in again["offset_mapping"]]
        assert pieces == TOKENIZER.convert_ids_to_tokens(ids)


def test_digits_are_single_tokens_however_they_are_spaced() -> None:
    assert encode("47") == encode("4 7") == TOKENIZER.convert_tokens_to_ids(["4", "7"])
    assert encode("<step_1>") == [TOKENIZER.convert_tokens_to_ids("<step_1>")]
    assert TOKENIZER.decode(encode("<answer> 4 7")) == "<answer> 47"


def test_vocabulary_has_no_duplicates_and_a_round_size() -> None:
    tokens = vocabulary()
    assert len(tokens) == len(set(tokens)) == len(TOKENIZER)
    assert len(tokens) % 64 == 0


def test_chat_template_puts_the_context_after_the_question_in_one_turn() -> None:
    def prompt(content: str) -> list[int]:
        turn = [{"role": "user", "content": content}]
        return TOKENIZER.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]

    question = "47 + 8 mod 100"
    student = prompt(question)
    teacher = prompt(f"{question}\n<critique>\n<answer> 55\n</critique>")
    assert TOKENIZER.convert_ids_to_tokens(student) == (
        ["<bos>", "<user>", *"47+8", "mod", *"100", "<assistant>"]
    )
    shared = len(student) - 1
    assert teacher[:shared] == student[:shared]
    assert TOKENIZER.convert_ids_to_tokens(teacher[shared:]) == (
        ["<critique>", "<answer>", "5", "5", "</critique>", "<assistant>"]
    )


def test_chat_template_closes_an_assistant_turn_and_refuses_other_roles() -> None:
    chat = [{"role": "user", "content": "4"}, {"role": "assistant", "content": "5"}]
    ids = TOKENIZER.apply_chat_template(chat)["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == (
        ["<bos>", "<user>", "4", "<assistant>", "5", "<eos>"]
    )
    with pytest.raises(Exception, match="got system"):
        TOKENIZER.apply_chat_template([{"role": "system", "content": "4"}])


def test_saved_tokenizer_loads_alike(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "<step_1> now 47 plus 8 makes 55"
    assert loaded(text, add_special_tokens=False)["input_ids"] == encode(text)
    assert loaded.decode(encode(text)) == text
    assert loaded.chat_template == TOKENIZER.chat_template
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert set(loaded.all_special_tokens) == set(TOKENIZER.all_special_tokens)


def test_nothing_but_special_tokens_decodes_to_nothing() -> None:
    assert TOKENIZER.decode([TOKENIZER.eos_token_id], skip_special_tokens=True) == ""


def test_the_shipped_tokenizer_is_the_built_one() -> None:
    solver = Path(__file__).parents[3] / "examples" / "arithmetic" / "solver"
    shipped = AutoTokenizer.from_pretrained(solver)
    assert shipped.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert shipped.chat_template == TOKENIZER.chat_template


def test_feedback_has_no_unknown_word() -> None:
    text = "<feedback> <step_2> is wrong <answer> 17 is right </feedback>"
    assert TOKENIZER.unk_token_id not in encode(text)
    assert TOKENIZER.decode(encode(text)) == text
