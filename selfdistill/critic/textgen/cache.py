"""Answers kept on disk: nothing is asked twice, not even after a crash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from selfdistill.critic.textgen.interface import Generation, TextGenerator
from selfdistill.runlog import write_atomically


class CachedGenerator:
    """Asks another generator only what it was never asked before.

    One file an answer, named by the hash of identity and prompt, written as soon as it is there and
    in one step, so a kill at any moment loses at most the answers under way. The identity holds a
    model's name, not its weights: when a folder gets other weights, take another cache folder.

    Args:
        inner: answers what is not in the cache.
        folder: created when it is needed; runs may share it.
    """

    def __init__(self, inner: TextGenerator, folder: Path) -> None:
        self._inner = inner
        self._folder = folder
        self.identity = inner.identity

    def check(self, prompt: str) -> None:
        """See `TextGenerator`."""
        self._inner.check(prompt)

    def generate(self, prompts: Sequence[str]) -> Iterator[tuple[int, Generation]]:
        """Yield what is known, then what the inner generator answers; equal prompts count once.

        Raises:
            EngineError: see the inner generator.
            OSError: the folder cannot be written.
        """
        unknown: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            known = None if prompt in unknown else self._read(prompt)
            if known is None:
                unknown.setdefault(prompt, []).append(place)
            else:
                yield place, known
        asked = list(unknown)
        if not asked:
            return
        for index, generation in self._inner.generate(asked):
            self._write(asked[index], generation)
            for place in unknown[asked[index]]:
                yield place, generation

    def _path(self, prompt: str) -> Path:
        key = hashlib.sha256(f"{self.identity}\n{prompt}".encode()).hexdigest()
        return self._folder / key[:2] / f"{key}.json"

    def _read(self, prompt: str) -> Generation | None:
        """Return a kept answer; what is no such file (a full disk, a foreign hand) is no answer."""
        try:
            entry = json.loads(self._path(prompt).read_text(encoding="utf-8"))
            if (entry["identity"], entry["prompt"]) == (self.identity, prompt):
                return Generation(str(entry["text"]), bool(entry["finished"]))
        except (OSError, ValueError, LookupError, TypeError):
            pass
        return None

    def _write(self, prompt: str, generation: Generation) -> None:
        entry = {
            "identity": self.identity,
            "prompt": prompt,
            "text": generation.text,
            "finished": generation.finished,
        }
        write_atomically(self._path(prompt), json.dumps(entry))
