"""One user turn through a chat template, where text can never become a control token.

Questions, attempts and critiques are text of others: a data set or a model may write `<|im_end|>`
into them, and a tokenizer that reads the rendered prompt as a whole would end the turn there. So
the template is rendered once, around a mark in place of the text; the text never passes through
it. Then opening, text and closing are tokenised together, exactly as the template itself would
have it; where the text spells a control token, by a copy of the tokenizer that does not know it by
that name (`selfdistill.prompts.literal`). Whatever was done, the ids are only returned when they
hold the control tokens of the template, in its order, and no other.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError
from selfdistill.model.folder import UnusableModelError
from selfdistill.prompts.literal import LiteralTokenizer, control_pattern

_MARK = "SELFDISTILLUSERTURN"
_DATES = "selfdistill_dates"
_ANOTHER_DAY = date(1987, 6, 5)
_QUOTED = re.compile(r"'([^'\\]*)'|\"([^\"\\]*)\"")
# SentencePiece writes a space so; runs of white space and single bytes are parts of any text.
_PART_OF_ANY_TEXT = re.compile(r"[\s▁]*|<0x[0-9A-F]{2}>")


class ControlTokenError(UserError):
    """A text could not be tokenised without a control token in it."""


class ChatTemplate:
    """Turns text into the token ids of a prompt with one user turn.

    Control tokens are all tokens that were added to the vocabulary, special or not (Qwen3's
    `</think>` and `<tool_call>` count as ordinary there), except runs of white space and bytes. The
    token of unknown words may stand for a word, and for a spelled control token where a vocabulary
    of words has no other.

    Args:
        tokenizer: of the tokenizers library, with a chat template that puts the text of a turn into
            the prompt as it is.
        variables: more variables for the template, such as {"enable_thinking": False}.
        setting: the section of the configuration that says which template, for messages.
        today: the date that the template is told where it asks for one; None: that of this day.
        before: turns before that of the user, as (role, text). They go through the template as
            they are: control tokens that they spell become such.

    Attributes:
        writes_date: whether a prompt depends on the date.

    Raises:
        UnusableModelError: no chat template, one that fails, or one that does not keep the text of
            a turn in one piece; a tokenizer of another library, or one that cuts the same text in
            several ways.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variables: Mapping[str, Any] | None = None,
        *,
        setting: str = "prompt",
        today: date | None = None,
        before: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._before = [{"role": role, "content": text} for role, text in before]
        self._today = today or date.today()
        self._tokenizer = tokenizer
        self._setting = setting
        if tokenizer.chat_template is None:
            raise UnusableModelError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template, as is usual for a "
                f"base model: set {setting}.chat_template to a file with a Jinja template of a "
                "turn, at its simplest {{ messages[0]['content'] }}"
            )
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnusableModelError(
                f"tokenizer {tokenizer.name_or_path!r} is a {type(tokenizer).__name__}, expected "
                "one of the tokenizers library (a folder with tokenizer.json): others cannot keep "
                "a text that spells control tokens from becoming them"
            )
        if getattr(backend.model, "dropout", None):
            raise UnusableModelError(
                f"tokenizer {tokenizer.name_or_path!r} drops merges at random (model.dropout "
                f"{backend.model.dropout:g} in tokenizer.json), expected null: a prompt would get "
                "other tokens each time"
            )
        added = {
            text: index
            for text, index in tokenizer.get_added_vocab().items()
            if not _PART_OF_ANY_TEXT.fullmatch(text)
        }
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        self._control_ids = {*added.values()} - ({tokenizer.unk_token_id} - ends)
        self._control_text = control_pattern(added)
        self._literal = LiteralTokenizer(backend, added)
        self._render(variables)

    def with_variables(self, variables: Mapping[str, Any] | None) -> ChatTemplate:
        """Return the same template with other variables; no second copy of the vocabulary."""
        other = copy.copy(self)
        other._render(variables)
        return other

    def _render(self, variables: Mapping[str, Any] | None) -> None:
        """Find what the template puts before and behind the text of a turn."""
        rendered = self._rendered(self._today, variables)
        self.writes_date = rendered != self._rendered(_ANOTHER_DAY, variables)
        if rendered.count("None") > self._rendered(None, variables).count("None"):
            raise UnusableModelError(
                f"{self._setting}: the chat template of {self._tokenizer.name_or_path!r} asks for "
                "the date in a form that is not written out in it, so it cannot be kept the same "
                f"from day to day: write the form out, in another {self._setting}.chat_template"
            )
        if rendered.count(_MARK) != 1:
            raise UnusableModelError(
                f"the chat template of {self._tokenizer.name_or_path!r} puts the text of a user "
                f"turn into the prompt {rendered.count(_MARK)} times, expected once and unchanged: "
                f"set {self._setting}.chat_template to a file with another one"
            )
        self._opening, self._closing = rendered.split(_MARK)
        if self._literal.encode(self._opening, _MARK, self._closing) != self._ids(rendered):
            raise UnusableModelError(
                f"tokenizer {self._tokenizer.name_or_path!r} cuts the chat template itself in a "
                "way that depends on the names of its control tokens, so a text that spells one "
                "could not be told from it: use another tokenizer"
            )

    def _rendered(self, today: date | None, variables: Mapping[str, Any] | None) -> str:
        """Render a turn with that date; None leaves the date to the clock of the template."""
        try:
            template = self._tokenizer.get_chat_template()
            told: dict[str, Any] = {}
            if today is not None and "strftime_now" in template:
                # transformers' own looks at the clock, and takes data only as variables.
                day = datetime.combine(today, time.min)
                told = {_DATES: {form: day.strftime(form) for form in _forms(template)}}
                template = f"{{% set strftime_now = {_DATES}.get %}}\n{template}"
            rendered = self._tokenizer.apply_chat_template(
                [*self._before, {"role": "user", "content": _MARK}],
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
                **{**told, **(variables or {})},
            )
        except Exception as error:  # a template is a program of somebody else
            raise UnusableModelError(
                f"{self._setting}: the chat template of {self._tokenizer.name_or_path!r} fails on "
                f"{_turns(self._before)} ({type(error).__name__}: {error}): give it what it asks "
                f"for as template variables, or another one as {self._setting}.chat_template"
            ) from error
        return str(rendered)

    @property
    def largest_token(self) -> int:
        """The largest id that a prompt may have: of the template, or of any text."""
        ordinary = (i for i in self._tokenizer.get_vocab().values() if i not in self._control_ids)
        return max([*ordinary, *self._ids(self._opening), *self._ids(self._closing)])

    def encode(self, text: str, more: str = "") -> list[int]:
        """Return the prompt whose user turn says `text`, and `more` from a new line on.

        White space around both is dropped. Prompts of the same `text` share its tokens whatever
        follows: where the text's last token could swallow the new line ("?\\n" is one token of
        many vocabularies), a token ends with the text all the same, if the tokenizer can begin one
        there without changing the text.

        Raises:
            ControlTokenError: the tokenizer makes control tokens of plain text.
        """
        text, more = text.strip(), more.strip()
        alone = self._encode(self._opening, text, self._closing)
        if not more:
            return alone
        whole = self._encode(self._opening, f"{text}\n{more}", self._closing)
        shared = self._encode(self._opening, text, "")
        if alone[: len(shared)] != shared or whole[: len(shared)] == shared:
            return whole
        parted = shared + self._encode("", f"\n{more}", self._closing)
        # A vocabulary of the SentencePiece kind would put a space before the new line.
        same_text = self._tokenizer.decode(parted) == self._tokenizer.decode(whole)
        return parted if same_text else whole

    def _encode(self, opening: str, text: str, closing: str) -> list[int]:
        expected = self._controls(self._ids(opening)) + self._controls(self._ids(closing))
        if not self._control_text.search(text):
            ids = self._ids(opening + text + closing)
            if self._controls(ids) == expected:
                return ids
        # Also for tokenizers that change the text before they look for control tokens in it, and
        # for a text that makes one together with the template.
        ids = self._literal.encode(opening, text, closing)
        if self._controls(ids) == expected:
            return ids
        wrong = {*self._controls(ids)} - {*expected} or {*self._controls(ids)}
        raise ControlTokenError(
            f"tokenizer {self._tokenizer.name_or_path!r} makes control tokens "
            f"{self._tokenizer.convert_ids_to_tokens(sorted(wrong))} of the text {text[:80]!r}, "
            "which does not spell any: is one of them its token of unknown words?"
        )

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _controls(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in self._control_ids]


def _turns(before: Sequence[Mapping[str, str]]) -> str:
    roles = [turn["role"] for turn in before]
    return f"the turns {', '.join([*roles, 'user'])}" if roles else "a single user turn"


def _forms(template: str) -> list[str]:
    """What a template may want the date written as: every quoted text with a % in it."""
    quoted = (one or other for one, other in _QUOTED.findall(template))
    return [text for text in quoted if "%" in text]
