from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import token_records
from html_page import read
from rich.console import Console
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from typer.testing import CliRunner

import selfdistill.analysis.run
from selfdistill.analysis.draw import Draw, draw_attempts
from selfdistill.analysis.localisation import localise
from selfdistill.analysis.report.analysis_page import write_analysis
from selfdistill.analysis.report.analysis_tables import analysis_tables, missing_note
from selfdistill.analysis.run import RunAnalysis, analyze_run, method_figures, score_method
from selfdistill.analysis.sections import method_labels, parse_methods
from selfdistill.analysis.tokens import TokenAnalysis
from selfdistill.cli import app
from selfdistill.config import Config, ConfigError, OptimizerConfig, RefSolMethod, StepAlignMethod
from selfdistill.evaluation.intervals import Interval
from selfdistill.prompts.context import ContextRenderer
from selfdistill.rollout.engine import Rollout, SamplingParams
from selfdistill.seeds import derive_seed
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.interface import Problem, Verdict
from selfdistill.training.loop import train
from selfdistill.training.solver import Solver, load_solver

QUIET = Console(file=io.StringIO())


def make_config(solver_dir: Path, output: Path, **method: object) -> Config:
    return Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": output,
            "device": "cpu",
            "steps": 1,
            "prompts_per_step": 1,
            "task": {"name": "arithmetic", "step_counts": [2], "reference_dialect": 3},
            "method": {"name": "stepalign", "group_size": 2, **method},
            "rollout": {"max_new_tokens": 8},
            "evaluation": {"every": 5, "problems": 2, "samples": 2},
        }
    )


@pytest.fixture
def finished(solver_dir: Path, tmp_path: Path) -> Path:
    """Return the folder of a run of one step."""
    output = tmp_path / "run"
    train(make_config(solver_dir, output), console=QUIET)
    return output


def test_the_command_writes_page_markdown_and_json(finished: Path) -> None:
    options = ["--methods", "stepalign, {name: refsol}", "--attempts", "5", "--problems", "4"]
    result = CliRunner().invoke(
        app, ["analyze", str(finished), *options, "--checkpoint", "last", "--samples", "2"]
    )
    assert result.exit_code == 0, result.output
    folder = finished / "analysis-last"
    assert sorted(path.name for path in folder.iterdir()) == [
        "analysis.html",
        "analysis.json",
        "analysis.md",
    ]
    document = json.loads((folder / "analysis.json").read_text())
    assert (document["checkpoint"], document["step"], document["split"]) == ("last", 1, "test")
    assert (document["wrong"], document["as_they_come"]) == (5, 5)
    stepalign, refsol = document["methods"]
    assert (stepalign["label"], refsol["label"]) == ("stepalign", "refsol")
    assert stepalign["wrong"]["attempts"] == refsol["wrong"]["attempts"] == 5
    assert stepalign["wrong"]["mean"] != refsol["wrong"]["mean"]
    for example in document["examples"]:
        first, second = example["records"]
        assert first["response"] == second["response"]
        # Log-probs of order 5, packed with other contexts: a hundred times the rounding of 1.
        assert first["student_logprob"] == pytest.approx(second["student_logprob"], abs=1e-5)
        assert second["context"] == second["reference"] != first["context"]

    markdown = (folder / "analysis.md").read_text()
    compared = "times this share of \\|A\\| with stepalign, same attempts"
    assert compared in markdown
    page = read(folder / "analysis.html")
    assert page.sections == ["figures", "examples", "tables"]
    assert not page.tags & {"script", "link", "img"}
    assert page.links == []
    text = page.within().replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")
    figure = stepalign["wrong"]["mean"]
    shown = f"{figure['value']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}]"
    assert shown in markdown
    assert shown in text
    assert "arithmetic and no measurement" in text
    assert "Advantage masks: refsol" in text
    assert "went wrong" in result.output


def test_figures_are_those_of_the_records(solver_dir: Path, finished: Path) -> None:
    """The base checkpoint as student and base teacher: only the context makes a difference."""
    analysis = analyze_run(
        finished, checkpoint="base", attempts=4, problems=3, samples=2, console=QUIET
    )
    assert analysis.step == 0
    config = make_config(solver_dir, finished)
    solver = load_solver(config)
    draw = draw_attempts(
        solver, split="test", attempts=4, problems=3, samples=2, seed=derive_seed(0, "analyze")
    )
    records = score_method(solver, config, draw)
    wrong = [r for place, r in zip(draw.chosen, records, strict=True) if place in draw.wrong]
    (method,) = analysis.methods
    assert method.all_wrong == localise(wrong)
    assert method.all_wrong.attempts == (method.first_wrong.attempts + method.later_wrong.attempts)
    assert analysis.rollouts == sum(len(group.rollouts) for group in draw.attempts)


def test_an_averaged_teacher_has_the_average_of_the_checkpoint(
    solver_dir: Path, tmp_path: Path
) -> None:
    config = make_config(solver_dir, tmp_path / "run", teacher={"name": "ema", "decay": 0.9})
    config = config.model_copy(
        update={"optimizer": OptimizerConfig(learning_rate=0.1, warmup_steps=0)}
    )
    train(config, console=QUIET)
    last = tmp_path / "run" / "checkpoints" / "last"
    solver = load_solver(config, last)
    draw = draw_attempts(solver, split="test", attempts=2, problems=3, samples=1, seed=0)
    averaged = score_method(solver, config, draw, checkpoint=last)
    as_student = score_method(solver, config, draw)
    for one, other in zip(averaged, as_student, strict=True):
        assert one.student_logprob == other.student_logprob
        assert one.teacher_logprob != pytest.approx(other.teacher_logprob, abs=1e-3)


def test_methods_carry_the_teacher_and_loss_of_the_run(solver_dir: Path, tmp_path: Path) -> None:
    config = make_config(
        solver_dir,
        tmp_path,
        teacher={"name": "live"},
        loss={"objective": {"name": "reverse_kl"}},
    )
    (own,) = parse_methods(None, config)
    assert own == config.method
    named, refsol = parse_methods("stepalign, {name: refsol, group_size: 3}", config)
    assert named == own
    assert isinstance(refsol, RefSolMethod)
    assert refsol.group_size == 3
    assert refsol.teacher.name == "live"
    assert refsol.loss == own.loss
    assert method_labels([own, refsol]) == ["stepalign", "refsol"]
    assert method_labels([own, own]) == ["stepalign #1", "stepalign #2"]
    grpo = Config.model_validate(
        {"model": "m", "output_dir": "o", "method": {"name": "grpo", "kl": {}}}
    )
    with pytest.raises(ConfigError, match="grpo does not follow a teacher's distribution"):
        parse_methods(None, grpo)
    with pytest.raises(ConfigError, match="grpo does not follow a teacher's distribution"):
        parse_methods("grpo", config)
    (usual,) = parse_methods("stepalign", grpo)
    assert usual == StepAlignMethod()
    for text, message in (
        ("nonsense", "'nonsense' is not a method"),
        ("{name: refsol, critic: x}", "critic"),
        ("[", "not a list"),
        ("", "got none"),
        ("3", "not a method"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_methods(text, config)


class AnswersOnly:
    """A task whose checker knows no steps."""

    name = "answers"
    instruction = ""
    strict_means = "right answer"

    def __init__(self, solved: Callable[[str], bool]) -> None:
        self.steps = ArithmeticTask(step_counts=(2,))
        self.solved = solved

    def size(self, split: str) -> int | None:
        return 3

    def problems(self, *, split: str, count: int, seed: int = 0) -> list[Problem]:
        return self.steps.problems(split=split, count=count, seed=seed)

    def check(self, problem: Problem, response: str) -> Verdict:
        correct = self.solved(problem.id)
        return Verdict("1", correct, correct, None, None, True)

    def majorities(self, groups: Sequence[Sequence[str]]) -> list[str | None]:
        return [answers[0] if answers else None for answers in groups]


class ReferenceEngine:
    """Writes the same few tokens whatever it is asked."""

    def __init__(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
        self.rollout = Rollout(tokens, [0.0] * len(tokens), str(tokenizer.decode(tokens)), True)
        self.seeds: list[int] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        self.seeds.append(params.seed)
        return [[self.rollout] * group_size for _ in prompts]


def make_solver(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, solved: Callable[[str], bool]
) -> Solver:
    return Solver(
        Config(model="unused", output_dir=Path("unused")),
        model,
        tokenizer,
        AnswersOnly(solved),
        ReferenceEngine([7, 8, 9, tokenizer.eos_token_id], tokenizer),  # type: ignore[arg-type]
        ContextRenderer(tokenizer),
    )


def test_problems_are_gone_through_again_until_enough_went_wrong(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = [p.id for p in ArithmeticTask(step_counts=(2,)).problems(split="test", count=3)]
    solver = make_solver(make_model(), tokenizer, lambda problem: problem != ids[1])
    seen: list[int] = []
    draw = draw_attempts(
        solver, split="test", attempts=2, problems=9, samples=1, seed=5, progress=seen.append
    )
    assert [group.problem.id for group in draw.attempts] == ids * 2
    assert draw.wrong == [(1, 0), (4, 0)]
    assert draw.as_they_come == [(0, 0), (1, 0)]
    assert draw.chosen == [(0, 0), (1, 0), (4, 0)]
    assert seen == [1, 2]
    assert solver.engine.seeds == [5, 8]  # type: ignore[attr-defined]

    never = make_solver(make_model(), tokenizer, lambda problem: True)
    draw = draw_attempts(never, split="test", attempts=2, problems=3, samples=1, seed=5)
    assert draw.wrong == []
    assert 20 <= len(draw.attempts) <= 22


def test_without_known_steps_the_analysis_says_what_it_cannot_show(
    finished: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = selfdistill.analysis.run.load_solver
    known = ArithmeticTask(step_counts=(2,)).problems(split="test", count=1)[0].id

    def without_steps(*arguments: object) -> Solver:
        solver = load(*arguments)  # type: ignore[arg-type]
        return replace(solver, task=AnswersOnly(lambda problem: problem == known))

    monkeypatch.setattr(selfdistill.analysis.run, "load_solver", without_steps)
    analysis = analyze_run(finished, methods="refsol", attempts=3, problems=6, console=QUIET)
    assert not analysis.knows_steps
    assert "marked no wrong step" in missing_note(analysis)
    titles = [table.title for table in analysis_tables(analysis)]
    assert titles == ["Whole attempts", "Suggested advantage masks (method.loss.advantage_mask)"]
    (method,) = analysis.methods
    assert method.all_wrong.attempts == 0
    assert method.wrong.attempts == 3
    page = read(write_analysis(analysis, tmp_path / "out"))
    text = page.within()
    assert "marked no wrong step" in text
    assert "before the first wrong step" not in text
    assert page.within("heat")  # attempts are shown all the same
    assert "marked no wrong step" in (tmp_path / "out" / "analysis.md").read_text()


def record(
    problem: str, context: str, *advantage: float, wrong: tuple[int, int] = (0, 1)
) -> TokenAnalysis:
    return token_records.record(list(advantage), wrong, problem=problem, context=context)


def test_methods_are_compared_over_attempts_that_both_have_a_context_for() -> None:
    draw = Draw([], wrong=[(0, 0), (1, 0), (2, 0)], as_they_come=[(3, 0)])
    later = (1, 2)
    first = [
        record("p", "seen", 0.0, -2.0, wrong=later),
        record("q", "seen", 0.0, -2.0, wrong=later),
        record("r", "seen", -9.0, -1.0),
        record("s", "seen", 0.0, -1.0, wrong=later),
    ]
    other = [
        record("p", "seen", 2.0, -2.0, wrong=later),
        record("q", "", 0.0, 0.0, wrong=later),
        record("r", "seen", -9.0, -9.0),
        record("s", "seen", 0.0, -1.0, wrong=later),
    ]
    # Only p: q has no context, r is wrong from the start, s was drawn but did not go wrong.
    figures = method_figures("m", {"name": "m"}, draw, other, first=first)
    assert figures.share_times == Interval(2.0, 2.0, 2.0)


def test_attempts_without_context_are_in_no_figure() -> None:
    draw = Draw([], wrong=[(0, 0), (1, 0)], as_they_come=[(0, 0), (1, 0), (2, 0)])
    records = [record("p", "seen", -2.0), record("q", "", 0.0), record("r", "", 0.0)]
    figures = method_figures("m", {"name": "m"}, draw, records, first=records)
    assert figures.without_context == 2
    assert figures.wrong.attempts == figures.first_wrong.attempts == 1
    assert figures.first_wrong.mean_at == Interval(-2.0, -2.0, -2.0)
    assert figures.masks[0].rho.value == 1.0


def test_no_attempt_that_went_wrong_is_said(finished: Path, tmp_path: Path) -> None:
    analysis = analyze_run(finished, attempts=1, problems=1, console=QUIET)
    perfect = RunAnalysis(**{**analysis.__dict__, "wrong": 0, "examples": (), "knows_steps": False})
    assert "No attempt went wrong" in missing_note(perfect)
    read(write_analysis(perfect, tmp_path / "out"))
