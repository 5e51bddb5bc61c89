"""The word-level tokenizer of the arithmetic solver, with its chat template."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from selfdistill.tasks.arithmetic.traces import ANSWER_TAG, DIALECTS, MAX_STEPS

_SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
_CONTEXT_TAGS = ["<critique>", "</critique>", "<reference>", "</reference>"]
# Last, so that the ids before them stay; the shipped solver's pretraining had none of them.
_FEEDBACK = ["<feedback>", "</feedback>", "right", "wrong"]
_VOCABULARY_MULTIPLE = 64

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% elif message['role'] == 'assistant' %}<assistant> {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('roles are user and assistant, got ' ~ message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def vocabulary() -> list[str]:
    """Return the tokens in the order of their ids, filled up to a multiple of 64."""
    phrases = [
        phrase
        for dialect in DIALECTS
        for phrase in (dialect.open, dialect.plus, dialect.minus, dialect.equals)
    ]
    words = [
        *_SPECIAL,
        *map(str, range(10)),
        *("+", "-", "mod"),
        *(f"<step_{number}>" for number in range(1, MAX_STEPS + 1)),
        ANSWER_TAG,
        *_CONTEXT_TAGS,
        *(word for phrase in phrases for word in phrase.split()),
        *_FEEDBACK,
    ]
    tokens = list(dict.fromkeys(words))
    unused = -len(tokens) % _VOCABULARY_MULTIPLE
    return [*tokens, *(f"<unused_{number}>" for number in range(unused))]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token a word, tag or digit; `47` and `4 7` give the same ids.

    Decoding puts one space between tokens, except between two digits, and encoding the decoded
    text gives the same ids back, so character spans of a text can be mapped to its tokens.
    """
    tokens = vocabulary()
    backend = Tokenizer(
        WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"<[^<>\s]*>|\d|[^\s\d<>]+|[<>]"), behavior="removed", invert=True
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("$"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(r"(?<=\d) (?=\d)"), ""),
            # Not decoders.Strip: it panics on an empty text, such as a lone <eos> that is skipped.
            decoders.Replace(Regex(" $"), ""),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
