"""A copy of a tokenizer in which no text can spell a control token.

Cutting a text up inside what it spells, and joining the tokens of the pieces, changes the text with
vocabularies of the SentencePiece kind: every piece begins with a mark of its own. So the text stays
whole, and the control tokens change their names instead, to secret ones that the template's own
parts are given and a text cannot hold. All else is the tokenizer's own: normalizer,
pre-tokenization, merges, and what it puts before or strips around a control token.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from typing import Any

from tokenizers import Tokenizer

from selfdistill.model.folder import UnusableModelError


class LiteralTokenizer:
    """Tokenises text between parts of a template; ids are those of the original tokenizer.

    Args:
        backend: the original.
        controls: its control tokens, as text.

    Raises:
        UnusableModelError: one of them is a character of the alphabet that texts are spelled with,
            or the copy gives other ids to them.
    """

    def __init__(self, backend: Tokenizer, controls: Collection[str]) -> None:
        letters = [text for text in controls if len(text) == 1 and _is_in_model(backend, text)]
        if letters:
            raise UnusableModelError(
                f"the added tokens {letters} are single characters that the vocabulary spells "
                "texts with, expected longer ones: remove them from the tokenizer"
            )
        salt = secrets.token_hex(8)
        # Letters and digits only, which no normalizer changes; none begins with another one.
        self._names = {text: f"c{salt}{place:06d}" for place, text in enumerate(sorted(controls))}
        self._control_text = control_pattern(controls)
        self._copy = Tokenizer.from_str(json.dumps(_renamed(backend, self._names)))
        for text, name in self._names.items():
            if self._copy.token_to_id(name) != backend.token_to_id(text):
                raise UnusableModelError(
                    f"control token {text!r} has id {backend.token_to_id(text)}, but a copy of its "
                    f"tokenizer.json gives it {self._copy.token_to_id(name)}: expected ids that "
                    "follow each other, so save the tokenizer again with save_pretrained"
                )

    def encode(self, opening: str, text: str, closing: str) -> list[int]:
        """Return the ids of all three together; only the outer two can hold control tokens."""
        ids: list[int] = self._copy.encode(
            self._hide(opening) + text + self._hide(closing), add_special_tokens=False
        ).ids
        return ids

    def _hide(self, part: str) -> str:
        return self._control_text.sub(lambda match: self._names[match[0]], part)


def control_pattern(controls: Collection[str]) -> re.Pattern[str]:
    """Return what finds any of them, the longest first; without any it finds nothing."""
    longest_first = sorted(controls, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _is_in_model(backend: Tokenizer, token: str) -> bool:
    return backend.model.token_to_id(token) is not None


def _renamed(backend: Tokenizer, names: dict[str, str]) -> dict[str, Any]:
    """Return the tokenizer's own JSON with other names for some tokens, which keep their places."""
    data: dict[str, Any] = json.loads(backend.to_str())
    data.update(truncation=None, padding=None, post_processor=None)
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = data["model"]
    vocabulary = model["vocab"]
    model["vocab"] = (
        {names.get(token, token): index for token, index in vocabulary.items()}
        if isinstance(vocabulary, dict)
        else [[names.get(token, token), score] for token, score in vocabulary]
    )
    if "merges" in model:  # what would make a control token of plain text stops before
        model["merges"] = [
            (left, right)
            for left, right in model["merges"]
            if not (left in names or right in names or left + right in names)
        ]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return data
