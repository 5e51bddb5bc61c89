from __future__ import annotations

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import selfdistill.filtering
from selfdistill.config import Config, ConfigError
from selfdistill.critic.interface import Critique
from selfdistill.filtering import FilterExistsError, FilterSettings, filter_problems
from selfdistill.rollout.attempts import Attempts
from selfdistill.rollout.engine import Rollout
from selfdistill.tasks.build import build_task
from selfdistill.tasks.interface import Problem, TaskError, Verdict

SETTINGS = FilterSettings(samples=4, below=Fraction(1, 2), split="train", problems=20)


class Killed(BaseException):
    """As good as kill -9 for the code under test."""


class Solver:
    """Solves the n-th problem in n % 4 of its attempts; dies when told to."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.task = build_task(config.task)
        self.engine = self.context = self
        self.student_prompt = None

    def with_room(self, problems: Sequence[Problem]) -> tuple[list[Problem], int]:
        return list(problems), 0


class Critic:
    """Knows the answer of every second problem, and needs a second try for half of these."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def critique(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Critique]:
        self.asked += [(p.id, text) for p, text in zip(problems, responses, strict=True)]
        return [
            Critique("D", f"<answer> {p.answer if _knows(p, r) else -1}", 1)
            for p, r in zip(problems, responses, strict=True)
        ]


def _number(problem: Problem) -> int:
    return int(problem.question.split()[0])


def _knows(problem: Problem, response: str) -> bool:
    n = _number(problem)
    return n % 8 < 2 or (n % 8 < 4 and response.startswith("second"))


class World:
    """A solver and a critic without models, and what they were asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.critic = Critic()
        self.sampled: list[str] = []
        self.seeds: list[int] = []
        self.dies_after = 1000
        path = folder / "all.jsonl"
        lines = [json.dumps({"q": f"{n} ?", "a": n, "n": f"p{n}"}) for n in range(20)]
        path.write_text("\n".join(lines))
        task = {
            "name": "jsonl",
            "splits": {"train": str(path)},
            "question": "q",
            "answer": "a",
            "id": "n",
            "checker": "plain",
        }
        self.config = Config.model_construct(
            **{
                **dict(Config(model="m", output_dir=folder)),
                "task": Config.model_validate(
                    {"model": "m", "output_dir": "o", "task": task, "method": {"name": "grpo"}}
                ).task,
            }
        )
        monkeypatch.setattr(selfdistill.filtering, "load_solver", Solver)
        monkeypatch.setattr(selfdistill.filtering, "_critic", lambda solver: self.critic)
        monkeypatch.setattr(selfdistill.filtering, "sample_attempts", self.sample)
        monkeypatch.setattr(selfdistill.filtering, "PORTION", 3)

    def sample(
        self, _: Any, __: Any, task: Any, problems: Sequence[Problem], *, samples: int, params: Any
    ) -> list[Attempts]:
        if len(self.sampled) >= self.dies_after:
            raise Killed
        self.sampled += [problem.id for problem in problems]
        self.seeds.append(params.seed)
        found = []
        for problem in problems:
            right = _number(problem) % 4
            answers = ["-1"] * (samples - right) + [problem.answer] * right
            texts = [f"{'second' if i else 'first'} <answer> {a}" for i, a in enumerate(answers)]
            verdicts: list[Verdict] = [task.check(problem, text) for text in texts]
            rollouts = [Rollout([1], [0.0], text, True) for text in texts]
            found.append(Attempts(problem, rollouts, verdicts))
        return found

    def filter(self, settings: FilterSettings = SETTINGS, name: str = "out.jsonl") -> Any:
        return filter_problems(
            self.config, self.folder / name, settings, console=Console(file=io.StringIO())
        )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def kept(path: Path) -> list[str]:
    return sorted(json.loads(line)["id"] for line in path.read_text().splitlines())


def test_it_keeps_what_the_base_fails_and_the_critic_solves(world: World) -> None:
    report = world.filter()
    hard = [n for n in range(20) if n % 4 < 2]
    solved = [n for n in hard if n % 8 < 2]
    assert kept(world.folder / "out.jsonl") == sorted(f"p{n}" for n in solved)
    assert report.count("kept") == len(solved)
    assert report.count("too_easy") == 10
    assert report.count("critic_failed") == len(hard) - len(solved)
    # The critic saw one wrong attempt of each hard problem, and no easy problem.
    assert sorted(world.critic.asked) == sorted((f"p{n}", "first <answer> -1") for n in hard)
    console = Console(file=io.StringIO(), width=120)
    console.print(report.table())
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert f"20 problems: {len(solved)} kept, 10 too easy (base Avg@4 of 1/2 or" in text
    assert "1/4" in text


def test_its_output_is_a_task(world: World) -> None:
    world.filter()
    record = json.loads((world.folder / "out.jsonl").read_text().splitlines()[0])
    assert record["split"] == "train"
    assert record["correct"] == int(record["id"][1:]) % 4
    task = {"name": "jsonl", "splits": {"train": str(world.folder / "out.jsonl")}, "id": "id"}
    settings = {"model": "m", "output_dir": "o", "method": {"name": "grpo"}}
    config = Config.model_validate({**settings, "task": {**task, "checker": "plain"}})
    read = build_task(config.task)
    before = {p.id: p for p in build_task(world.config.task).problems(split="train", count=20)}
    for problem in read.problems(split="train", count=read.size("train") or 0):
        assert before[problem.id] == problem


def test_more_critic_samples_give_more_chances(world: World) -> None:
    report = world.filter(
        FilterSettings(4, Fraction(1, 2), critic_samples=2, split="train", problems=20)
    )
    assert report.count("critic_failed") < 5
    assert report.count("kept") + report.count("critic_failed") == 10


@pytest.mark.parametrize("dies_after", [1, 4, 13, 20])
def test_killed_anywhere_it_goes_on_to_the_same_result(world: World, dies_after: int) -> None:
    world.filter(name="undisturbed.jsonl")
    seeds, world.seeds, world.sampled = world.seeds, [], []
    world.dies_after = dies_after
    if dies_after < 20:
        with pytest.raises(Killed):
            world.filter()
        assert not (world.folder / "out.jsonl").exists()
    world.dies_after = 1000
    journal = world.folder / "out.jsonl.journal"
    if journal.exists():  # a line that was being written
        with journal.open("a") as file:
            file.write('{"id": "p1", "quest')
    world.filter()
    expected = (world.folder / "undisturbed.jsonl").read_text()
    assert (world.folder / "out.jsonl").read_text() == expected
    assert journal.read_text() == (world.folder / "undisturbed.jsonl.journal").read_text()
    assert len(world.sampled) == 20  # nothing that was finished is done again
    assert sorted(world.seeds) == sorted(seeds)


def test_another_filters_journal_is_refused(world: World) -> None:
    world.filter()
    with pytest.raises(FilterExistsError, match=r"another below, seed: choose another --output"):
        world.filter(FilterSettings(4, Fraction(1, 4), split="train", problems=20, seed=1))


def test_bad_requests_are_named(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"model": str(solver_dir), "output_dir": tmp_path, "device": "cpu"}
    console = Console(file=io.StringIO())
    refsol = Config.model_validate({**settings, "method": {"name": "refsol"}})
    with pytest.raises(ConfigError, match="refsol has none: filter with"):
        filter_problems(refsol, tmp_path / "a", FilterSettings(problems=1), console=console)
    stepalign = Config.model_validate(settings)
    with pytest.raises(TaskError, match="say how many --problems"):
        filter_problems(stepalign, tmp_path / "b", FilterSettings(), console=console)


def test_the_scribe_solves_all_by_construction(solver_dir: Path, tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": tmp_path,
            "device": "cpu",
            "rollout": {"max_new_tokens": 6},
            "task": {"name": "arithmetic", "step_counts": [1]},
        }
    )
    report = filter_problems(
        config,
        tmp_path / "hard.jsonl",
        FilterSettings(samples=2, problems=3),
        console=Console(file=io.StringIO()),
    )
    assert report.count("critic_failed") == 0
    # A random model solves nothing.
    assert report.count("kept") == 9
    splits = [json.loads(line)["split"] for line in (tmp_path / "hard.jsonl").open()]
    assert splits == ["train"] * 3 + ["dev"] * 3 + ["test"] * 3
