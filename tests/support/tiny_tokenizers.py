"""Small tokenizers of the kinds that language models have."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NOT_SPECIAL = ["<think>", "</think>", "<tool_call>"]  # added, but read as ordinary text elsewhere
# No control token between the text and the end.
INST = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def byte_level(*, normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """Build a tokenizer with Qwen3's pre-tokenization, control tokens and turns."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges = [("?", "Ċ"), ("i", "s"), ("i", "m"), ("<", "|"), ("|", ">"), ("e", "n"), ("en", "d")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    if normalizer is not None:
        backend.normalizer = normalizer
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    backend.add_tokens(
        [AddedToken(text, normalized=normalizer is not None) for text in NOT_SPECIAL]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def sentence_piece(*, prepend: str = "first") -> PreTrainedTokenizerFast:
    """Build a Unigram tokenizer, whose model makes control tokens of plain text by itself.

    Args:
        prepend: where Metaspace puts a mark in front: "first" (of the whole text), "always" (after
            each control token, too), "never".
    """
    characters = [(character, -9.0) for character in map(chr, range(32, 127))]
    tokens = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("▁is", -4.0), *characters]
    backend = Tokenizer(models.Unigram(tokens, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = INST
    return tokenizer


def _bytes_and_characters(special: list[str], *, merges: list[tuple[str, str]]) -> dict[str, int]:
    """A SentencePiece vocabulary with a token for each byte and each character of ASCII."""
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*map(chr, range(33, 127)), "▁", *(left + right for left, right in merges)]
    return {token: index for index, token in enumerate(tokens)}


def legacy_llama(*, strips: bool = False) -> PreTrainedTokenizerFast:
    """Build Llama 2's tokenizer: its normalizer prepends a mark after every control token.

    Args:
        strips: control tokens swallow the white space that follows them (Phi-3).
    """
    merges = [("i", "s"), ("▁", "is"), ("<", "/")]
    backend = Tokenizer(
        models.BPE(
            _bytes_and_characters(["<unk>", "<s>", "</s>"], merges=merges),
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(
        [AddedToken(text, normalized=False, rstrip=strips) for text in ("<unk>", "<s>", "</s>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = INST
    return tokenizer


def new_llama() -> PreTrainedTokenizerFast:
    """Build transformers' own Llama tokenizer, which prepends a mark to the first word only."""
    merges = [("i", "s"), ("▁", "is"), ("<", "/")]
    vocabulary = _bytes_and_characters(["<unk>", "<s>", "</s>"], merges=merges)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.chat_template = INST
    return tokenizer


def gemma() -> PreTrainedTokenizerFast:
    """Build Gemma's: no mark in front; white space and HTML tags are added tokens, not special."""
    merges = [("▁", "▁"), ("i", "s"), ("▁", "is"), ("<", "b"), ("<b", ">")]
    vocabulary = _bytes_and_characters(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], merges=merges
    )
    tokenizer = GemmaTokenizer(vocab={**vocabulary, "\n": len(vocabulary)}, merges=merges)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
    )
    tokenizer.add_tokens(["\n", "\n\n", "▁▁", "<b>"])
    tokenizer.chat_template = (
        "{{ bos_token }}<start_of_turn>user\n{{ messages[0]['content'] }}<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    return tokenizer
