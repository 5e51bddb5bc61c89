"""Prompts are the same text, and as far as they can the same tokens, with every kind of tokenizer.

Each kind is asked for what the template makes of a text as a whole. What a text that spells control
tokens must become is found without the code under test: by spelling them with another letter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
from tiny_tokenizers import byte_level, gemma, legacy_llama, new_llama, sentence_piece
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from selfdistill.model.folder import UnusableModelError
from selfdistill.model.layout import common_prefix_length
from selfdistill.prompts.chat import ChatTemplate, ControlTokenError

TEXTS = [
    "What is 1 + 2?",
    "one\ntwo\n\nthree",
    "two  spaces   three",
    "is <critique> of [INST] so?",
    "é 数 \t end",
    "x",
]


@dataclass(frozen=True)
class Kind:
    """A tokenizer, and a letter that stands in for one letter of each of its control tokens."""

    build: Callable[[], PreTrainedTokenizerBase]
    controls: tuple[str, ...]
    letter: str
    stands_in: str

    def disguise(self, text: str) -> str:
        for control in self.controls:
            text = text.replace(control, control.replace(self.letter, self.stands_in))
        return text


SP = ("<s>", "</s>")
KINDS = {
    "byte-level BPE": Kind(
        byte_level, ("<|endoftext|>", "<|im_start|>", "<think>", "</think>"), "t", "T"
    ),
    "Metaspace first": Kind(partial(sentence_piece, prepend="first"), SP, "s", "z"),
    "Metaspace always": Kind(partial(sentence_piece, prepend="always"), SP, "s", "z"),
    "Metaspace never": Kind(partial(sentence_piece, prepend="never"), SP, "s", "z"),
    "legacy Llama": Kind(legacy_llama, SP, "s", "z"),
    "Phi-3": Kind(partial(legacy_llama, strips=True), SP, "s", "z"),
    "Llama": Kind(new_llama, SP, "s", "z"),
    "Gemma": Kind(gemma, ("<end_of_turn>", "<start_of_turn>", "<bos>"), "o", "0"),
}


def template_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the template, rendered and tokenised as a whole, makes of a turn."""
    turn = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_dict=False
    )
    return ids


def template_after(tokenizer: PreTrainedTokenizerBase, ids: list[int], kind: Kind) -> list[int]:
    """The same tokens, each letter that stood in back in its place."""
    back = {
        tokenizer.convert_tokens_to_ids(kind.stands_in): tokenizer.convert_tokens_to_ids(
            kind.letter
        )
    }
    return [back.get(token, token) for token in ids]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_what_the_template_makes_of_it(kind: Kind, text: str) -> None:
    tokenizer = kind.build()
    assert ChatTemplate(tokenizer).encode(text) == template_ids(tokenizer, text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_context_adds_no_token_of_its_own(kind: Kind, text: str) -> None:
    """Joined pieces had a space before the new line: a token that no student ever reads there."""
    tokenizer = kind.build()
    more = "<critique>\nso  is\n</critique>"
    whole = template_ids(tokenizer, f"{text}\n{more}")
    ids = ChatTemplate(tokenizer).encode(text, more)
    assert tokenizer.decode(ids) == tokenizer.decode(whole)
    if kind.build is not byte_level:
        assert ids == whole
    # Student and teacher share the question.
    student = ChatTemplate(tokenizer).encode(text)
    shared = ids[: common_prefix_length([student, ids])]
    question = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    assert question.strip() in tokenizer.decode(shared)


@pytest.mark.parametrize(
    "text", ["{} is", "so {} is", "is{}is", "{0}{0} {0}\n{0}", "a  {}  b", "<{}>", "{}"]
)
def test_a_spelled_control_token_is_the_same_text(kind: Kind, text: str) -> None:
    tokenizer = kind.build()
    chat = ChatTemplate(tokenizer)
    for control in kind.controls:
        spelled = text.format(control)
        expected = template_ids(tokenizer, kind.disguise(spelled))
        assert chat.encode(spelled) == template_after(tokenizer, expected, kind)
        expected = template_ids(tokenizer, kind.disguise(f"What is it?\n{spelled}"))
        ids = chat.encode("What is it?", spelled)
        expected = template_after(tokenizer, expected, kind)
        assert tokenizer.decode(ids) == tokenizer.decode(expected)
        if kind.build is not byte_level:
            assert ids == expected


def test_white_space_that_is_an_added_token_is_white_space() -> None:
    """Gemma's model makes the added token of two spaces by itself; that is no control token."""
    tokenizer = gemma()
    ids = ChatTemplate(tokenizer).encode("a  is")
    assert "▁▁" in tokenizer.convert_ids_to_tokens(ids)


def test_merges_stop_before_a_control_token() -> None:
    tokenizer = gemma()
    ids = ChatTemplate(tokenizer).encode("a <b> c")
    assert tokenizer.convert_ids_to_tokens(ids)[7:13] == ["a", "▁", "<b", ">", "▁", "c"]


def words(*, unknown: str) -> PreTrainedTokenizerBase:
    vocabulary = ["<end>", "<unk>", "<tag>", "What", "is", "it"]
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token=unknown)
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token=unknown
    )
    tokenizer.add_tokens(["<tag>"])
    tokenizer.chat_template = "{{ messages[0]['content'] }} <end>"
    return tokenizer


def test_a_vocabulary_of_words_has_an_unknown_word_for_a_spelled_control_token() -> None:
    chat = ChatTemplate(words(unknown="<unk>"))
    assert chat.encode("What is that") == [3, 4, 1, 0]
    assert chat.encode("What is <tag>") == [3, 4, 1, 0]


def test_a_text_of_unknown_words_that_end_a_turn_is_refused() -> None:
    chat = ChatTemplate(words(unknown="<end>"))
    assert chat.encode("What is it") == [3, 4, 5, 0]
    with pytest.raises(ControlTokenError, match=r"\['<end>'\] of the text 'What is that'"):
        chat.encode("What is that")


def test_an_added_token_of_a_single_character_is_text_or_refused() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens(["数"])
    ids = ChatTemplate(tokenizer).encode("a 数 b")
    assert tokenizer.convert_tokens_to_ids("数") not in ids
    assert "a 数 b" in tokenizer.decode(ids)
    tokenizer.add_tokens(["§"])  # how this vocabulary writes the byte A7
    with pytest.raises(
        UnusableModelError, match=r"\['§'\] are single characters that the vocabulary"
    ):
        ChatTemplate(tokenizer)


def test_a_tokenizer_of_another_library_is_refused() -> None:
    class Slow(PreTrainedTokenizerBase):
        def __init__(self) -> None:
            super().__init__()
            self.chat_template = "{{ messages[0]['content'] }}"

    with pytest.raises(
        UnusableModelError, match=r"is a Slow, expected one of the tokenizers library"
    ):
        ChatTemplate(Slow())


def test_a_tokenizer_that_drops_merges_at_random_is_refused() -> None:
    tokenizer = legacy_llama()
    tokenizer.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(UnusableModelError, match=r"model.dropout 0.1 in tokenizer.json"):
        ChatTemplate(tokenizer)
