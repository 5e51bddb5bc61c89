from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from selfdistill.critic.textgen.cache import CachedGenerator
from selfdistill.critic.textgen.interface import Generation
from selfdistill.rollout.engine import EngineError


class Counting:
    """Answers in reverse order and dies at the prompt "die"."""

    def __init__(self, identity: str = "model") -> None:
        self.identity = identity
        self.asked: list[str] = []

    def generate(self, prompts: Sequence[str]) -> Iterator[tuple[int, Generation]]:
        for place in reversed(range(len(prompts))):
            self.asked.append(prompts[place])
            if prompts[place] == "die":
                raise EngineError("dead")
            yield place, Generation(f"{self.identity}: {prompts[place]}", prompts[place] != "long")


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    inner = Counting()
    first = dict(CachedGenerator(inner, tmp_path).generate(["a", "long", "a"]))
    assert first[0] == first[2] == Generation("model: a", True)
    assert first[1] == Generation("model: long", False)
    assert sorted(inner.asked) == ["a", "long"]
    again = CachedGenerator(inner, tmp_path)
    assert dict(again.generate(["a", "b", "long"])) == {
        0: first[0],
        1: Generation("model: b", True),
        2: first[1],
    }
    assert sorted(inner.asked) == ["a", "b", "long"]


def test_another_model_has_answers_of_its_own(tmp_path: Path) -> None:
    list(CachedGenerator(Counting(), tmp_path).generate(["a"]))
    other = CachedGenerator(Counting("other"), tmp_path)
    assert other.identity == "other"
    assert dict(other.generate(["a"])) == {0: Generation("other: a", True)}


def test_answers_before_a_crash_are_kept(tmp_path: Path) -> None:
    inner = Counting()
    with pytest.raises(EngineError):
        list(CachedGenerator(inner, tmp_path).generate(["die", "a", "b"]))
    inner.asked.clear()
    assert len(list(CachedGenerator(inner, tmp_path).generate(["a", "b"]))) == 2
    assert inner.asked == []


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"identity": "model", "prompt": "b"}'])
def test_a_damaged_entry_is_asked_again(tmp_path: Path, damage: str) -> None:
    inner = Counting()
    list(CachedGenerator(inner, tmp_path).generate(["a"]))
    (entry,) = tmp_path.glob("*/*.json")
    entry.write_text(damage)
    for _ in range(2):
        assert dict(CachedGenerator(inner, tmp_path).generate(["a"])) == {
            0: Generation("model: a", True)
        }
    assert inner.asked == ["a", "a"]
