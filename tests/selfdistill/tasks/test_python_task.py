from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import lines

from selfdistill.analysis.comparison import read_run_curve
from selfdistill.config import Config, PythonTaskConfig, load_config
from selfdistill.methods.build import build_method
from selfdistill.rollout.attempts import Attempts
from selfdistill.rollout.engine import Rollout
from selfdistill.tasks.build import build_task, held_out_problems
from selfdistill.tasks.interface import (
    BatchTask,
    FeedbackTask,
    SteppedTask,
    StepTask,
    Task,
    TaskError,
)
from selfdistill.training.checkpoint import CheckpointError
from selfdistill.training.loop import train

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "own_task" / "own_task.yaml"
PROBLEMS = """
def problems():
    return [{"prompt": f"What is {i} + 1?", "solution": str(i + 1)} for i in range(40)]
"""
REWARD = """
def reward(prompts, completions, solution, **columns):
    return [float(known in text) for text, known in zip(completions, solution)]
"""


def written(folder: Path, text: str, **settings: Any) -> Task:
    path = folder / "mine.py"
    path.write_text(text)
    return build_task(PythonTaskConfig(file=str(path), **settings))


def test_problems_and_a_reward_of_ones_own(tmp_path: Path) -> None:
    task = written(tmp_path, PROBLEMS + REWARD, counts={"dev": 8, "test": 5})
    assert [task.size(split) for split in ("train", "dev", "test")] == [27, 8, 5]
    assert len(held_out_problems(task, split="dev", count="all")) == 8
    assert len(held_out_problems(task, split="dev", count=100)) == 8
    (problem, *_) = task.problems(split="train", count=1)
    right = str(int(problem.question.split()[2]) + 1)
    verdicts = [task.check(problem, text) for text in (f"The answer is {right}.", "no idea")]
    assert [(v.reward, v.correct, v.answer) for v in verdicts] == [
        (1.0, True, right),
        (0.0, False, None),
    ]
    assert task.majorities([["1", "2", "2.0"]]) == ["2"]
    assert not isinstance(task, (StepTask, FeedbackTask))


def test_a_question_of_two_splits_is_refused_by_its_line(tmp_path: Path) -> None:
    text = "\ndef problems(split):\n    return [{'prompt': 'the same', 'solution': '1'}]\n"
    with pytest.raises(
        TaskError,
        match=r"mine\.py, line 2: dev and train overlap.*\(problems\(\) without an argument\)",
    ):
        written(tmp_path, text + REWARD)


def test_conversations_are_handed_over_as_trl_does(tmp_path: Path) -> None:
    text = """
def problems(split):
    content = f"{split}?"
    return [{"prompt": [{"role": "user", "content": content}], "n": 1}]

async def reward(prompts, completions, n, log_metric, *, log_extra=None, **kwargs):
    log_metric("length", len(completions))
    assert prompts[0][0]["role"] == "user" and "trainer_state" not in kwargs
    return [0.5 if c[0] == {"role": "assistant", "content": "yes"} else None for c in completions]
"""
    task = written(tmp_path, text, correct_from=0.5)
    (problem,) = task.problems(split="dev", count=1)
    assert problem.question == "dev?"
    yes, no = task.check(problem, "yes"), task.check(problem, "no")
    assert (yes.reward, yes.correct, yes.undecided) == (0.5, True, False)
    assert (no.reward, no.correct, no.undecided) == (0.0, False, True)


def test_a_reward_of_trl_is_taken_as_it_is(tmp_path: Path) -> None:
    text = """
from trl.rewards import think_format_reward as reward

def problems():
    return [{"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(9)]
"""
    task = written(tmp_path, text)
    (problem,) = task.problems(split="train", count=1)
    assert task.check(problem, "<think>\nso\n</think>\n4").reward == 1.0
    assert task.check(problem, "4").reward == 0.0


def test_ids_may_come_again_in_another_split(tmp_path: Path) -> None:
    text = """
def problems(split):
    return [{"id": i, "prompt": f"{split} {i}?", "solution": f"{split} {i}"} for i in range(3)]
"""
    task = written(tmp_path, text + REWARD)
    for split in ("train", "dev", "test"):
        for problem in task.problems(split=split, count=3):
            assert task.check(problem, problem.question).reward == 1.0


def test_an_empty_cell_is_no_id_and_no_answer(tmp_path: Path) -> None:
    text = """
def problems():
    empty = [{"prompt": f"{i}?", "id": None, "answer": None} for i in range(3)]
    return [*empty, {"prompt": "zero?", "id": 0, "answer": 0}]

def reward(completions, **columns):
    return [0.0 for _ in completions]
"""
    task = written(tmp_path, text, shares={"train": 1.0, "dev": 0.0, "test": 0.0})
    found = {p.question: (p.id, p.answer) for p in task.problems(split="train", count=4)}
    assert found.pop("zero?") == ("0", "0")
    assert {answer for _, answer in found.values()} == {""}
    assert len({name for name, _ in found.values()} - {"None"}) == 3


def test_annotations_are_what_the_file_says(tmp_path: Path) -> None:
    check = "\ndef f(x: int): ...\nassert f.__annotations__ == {'x': int}\n"
    written(tmp_path, PROBLEMS + REWARD + check)


@pytest.mark.parametrize("key", ["completions", "prompts", "completion_ids", "log_metric"])
def test_a_column_does_not_stand_in_for_what_the_model_wrote(tmp_path: Path, key: str) -> None:
    text = f"def problems():\n    return [{{'prompt': '1?', 'solution': '1', '{key}': 'x'}}]\n"
    with pytest.raises(TaskError, match=rf"mine\.py, line 1: problem 0: it has the key '{key}'"):
        written(tmp_path, text + REWARD)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PROBLEMS, r"no function 'reward'"),
        ("x = (\n", r"mine\.py, line 1: the file failed with SyntaxError"),
        ("import os\n\n1 / 0\n", r"mine\.py, line 3: the file failed with ZeroDivisionError"),
        ("problems = 3\nreward = 4\n", r"reward is a int, expected a function"),
        ("def problems():\n    return []\n" + REWARD, r"line 1: problems returned no problem"),
        ("def problems():\n    return ['a']\n" + REWARD, r"line 1: problem 0 is a str"),
        ("def problems():\n    return [{'q': 1}]\n" + REWARD, r"the prompt is None, .* has q"),
        (
            PROBLEMS + "\ndef reward(completions, answers): ...",
            r"line 5: reward asks for the argument 'answers', which no problem has.*solution",
        ),
        (
            PROBLEMS + "\ndef reward(completions, completion_ids): ...",
            r"'completion_ids', which is not handed over here",
        ),
    ],
)
def test_a_file_that_does_not_do_is_named_with_its_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        written(tmp_path, text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", r"line 5: reward returned \[1\.0\] for 2 completions"),
        ("return 'ab'", r"reward returned 'ab' for 2 completions"),
        ("return [0, float('nan')]", r"gave the reward nan, expected a finite number"),
        ("return ['good', 'bad']", r"gave the reward 'good'"),
        ("return [columns['none']]", r"line 6: reward failed with KeyError: 'none'"),
    ],
)
def test_a_reward_that_goes_wrong_is_named_with_its_line(
    tmp_path: Path, body: str, message: str
) -> None:
    task = written(tmp_path, f"{PROBLEMS}\ndef reward(completions, **columns):\n    {body}\n")
    pairs = [(problem, "") for problem in task.problems(split="train", count=2)]
    assert isinstance(task, BatchTask)
    assert task.check_all([]) == []  # as on a process without a share; the reward is not asked
    with pytest.raises(TaskError, match=message):
        task.check_all(pairs)


def test_the_example_has_steps_feedback_and_rewards_between_wrong_and_right() -> None:
    task = build_task(load_config(EXAMPLE).task)
    assert all(task.size(split) for split in ("train", "dev", "test"))
    assert isinstance(task, StepTask)
    assert isinstance(task, FeedbackTask)
    assert not isinstance(task, SteppedTask)
    (problem,) = task.problems(split="train", count=1)
    a, b, c = problem.question.removesuffix(", each used once.").split(" with ")[1].split(", ")
    rewards = [task.check(problem, f"{a} {x} {b} {y} {c}").reward for x in "+-" for y in "+-"]
    assert sorted({0.1, *rewards}) == [0.1, 1.0]
    assert 1.0 in rewards
    assert task.check(problem, "nothing").reward == 0.0
    assert task.step_spans("a\nbc") == [(0, 1), (2, 4)]
    verdict = task.check(problem, "")
    assert task.feedback(problem, "", verdict, detail="answer") == "There is no sum."
    config = Config.model_validate(
        {
            "model": "m",
            "output_dir": "o",
            "task": {"name": "python", "file": "f"},
            "method": {"name": "environment", "loss": {"advantage_mask": {"per_step": True}}},
        }
    )
    method = build_method(config.method, task, temperature=1.0, device="cpu", today=None)
    rollout = Rollout([1], [0.0], "1 + 2", True)
    ((context,),) = method.contexts([Attempts(problem, [rollout], [verdict])])
    assert context is not None
    assert context.text.startswith("It gives 3, and ")


def test_grpo_learns_from_rewards_between_wrong_and_right(solver_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def problems():\n"
        "    return [{'prompt': f'{i}+{i}=?'} for i in range(40)]\n"
        "def reward(completions, **columns):\n"
        "    return [len(set(text)) / 20 for text in completions]\n"
    )
    settings = {
        "model": str(solver_dir),
        "output_dir": tmp_path / "run",
        "device": "cpu",
        "task": {"name": "python", "file": str(path), "counts": {"dev": 4, "test": 4}},
        "method": {"name": "grpo", "group_size": 3},
        "steps": 1,
        "prompts_per_step": 2,
        "rollout": {"max_new_tokens": 6},
        "evaluation": {"problems": "all", "samples": 1},
    }
    result = train(Config.model_validate(settings))
    (step,) = lines(tmp_path / "run", "metrics.jsonl")
    assert 0 < step["reward"] < 1
    assert step["taught"]
    evaluations = lines(tmp_path / "run", "evaluations.jsonl")
    assert result.best_metric == max(line["mean_reward"] for line in evaluations)
    assert all(math.isfinite(line["mean_reward"]) for line in evaluations)
    # As the page, the export and the resumed run read it.
    assert len(read_run_curve(tmp_path / "run").evaluations) == len(evaluations)
    assert train(Config.model_validate({**settings, "steps": 2}), resume=True).step == 2
    # Another reward would be another run.
    path.write_text(path.read_text().replace("20", "10"))
    with pytest.raises(CheckpointError, match="other task file"):
        train(Config.model_validate({**settings, "steps": 3}), resume=True)
