"""One user turn through a chat template, where text can never become a control token.

Questions, attempts and critiques are text of others: a data set or a model may write `<|im_end|>`
into them, and a tokenizer that reads the rendered prompt as a whole would end the turn there. So
the template is rendered once, around a mark in place of the text; the text never passes through
it. Then opening, text and closing are tokenised together, exactly as the template itself would
have it, unless the text spells a control token: such a text is cut inside every control token that
it spells. Whatever was done, the ids are only returned when they hold the control tokens of the
template, in its order, and no other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

_MARK = "SELFDISTILLUSERTURN"


class ControlTokenError(ValueError):
    """A text could not be tokenised without a control token in it."""


class ChatTemplate:
    """Turns text into the token ids of a prompt with one user turn.

    Control tokens are all tokens that were added to the vocabulary, special or not (Qwen3's
    `</think>` and `<tool_call>` count as ordinary there), except runs of white space. The token of
    unknown words may stand for a word.

    Args:
        tokenizer: with a chat template that puts the text of a turn into the prompt as it is.
        variables: more variables for the template, such as {"enable_thinking": False}.

    Raises:
        ValueError: no chat template, or one that does not keep the text of a turn in one piece.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any] | None = None
    ) -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template: prompts are rendered "
                "with it, so set tokenizer.chat_template"
            )
        self._tokenizer = tokenizer
        added = {text: index for text, index in tokenizer.get_added_vocab().items() if text.strip()}
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self._control_ids = {*added.values()} - ({tokenizer.unk_token_id} - ends)
        longest_first = sorted(added, key=len, reverse=True)
        self._control_text = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}],
            add_generation_prompt=True,
            tokenize=False,
            **(variables or {}),
        )
        if rendered.count(_MARK) != 1:
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} puts the text of a user turn "
                f"into the prompt {rendered.count(_MARK)} times, expected once and unchanged"
            )
        self._opening, self._closing = rendered.split(_MARK)

    def encode(self, text: str, more: str = "") -> list[int]:
        """Return the prompt whose user turn says `text`, and `more` from a new line on.

        White space around both is dropped. Prompts of the same `text` share its tokens whatever
        follows: where the text's last token could swallow the new line ("?\\n" is one token of
        many vocabularies), a token ends with the text all the same.

        Raises:
            ControlTokenError: the tokenizer makes control tokens of plain text.
        """
        text, more = text.strip(), more.strip()
        alone = self._encode(self._opening, text, self._closing)
        if not more:
            return alone
        shared = self._encode(self._opening, text, "")
        if alone[: len(shared)] == shared:
            return shared + self._encode("", f"\n{more}", self._closing)
        return self._encode(self._opening, f"{text}\n{more}", self._closing)

    def _encode(self, opening: str, text: str, closing: str) -> list[int]:
        expected = self._controls(self._ids(opening)) + self._controls(self._ids(closing))
        if not self._control_text.search(text):
            ids = self._ids(opening + text + closing)
            if self._controls(ids) == expected:
                return ids
        # Second, for tokenizers that change the text before they look for control tokens in it:
        # every character by itself.
        for pieces in (self._cut(text), list(text)):
            ids = [token for part in (opening, *pieces, closing) for token in self._ids(part)]
            if self._controls(ids) == expected:
                return ids
        raise ControlTokenError(
            f"tokenizer {self._tokenizer.name_or_path!r} makes control tokens of the text "
            f"{text[:80]!r}, cut up or not: is one of its added tokens a single character?"
        )

    def _cut(self, text: str) -> list[str]:
        """Cut after the first character of every control token that the text spells."""
        pieces, start = [], 0
        while match := self._control_text.search(text, start):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [*pieces, text[start:]]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _controls(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self._control_ids]
