"""Pages and terminals that show what models, data and servers wrote."""

from __future__ import annotations

import html
import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfdistill import cli
from selfdistill.analysis.report.document import document, html_table
from selfdistill.analysis.report.heatmap import heat_map, verdict
from selfdistill.analysis.report.text import isolated, plain
from selfdistill.analysis.tokens import TokenAnalysis, analyze
from selfdistill.config import Config
from selfdistill.evaluation.tables import TextTable
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.teacher import build_teacher
from selfdistill.planning.dry_run import dry_run
from selfdistill.progress import progress_bars
from selfdistill.rollout.attempts import sample_attempts
from selfdistill.rollout.engine import EngineError, SamplingParams
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.training.solver import load_solver
from selfdistill.visible import visible

# Turns what follows to the left; closes an isolate that others opened; a terminal's title; colours.
ACTING = ["\u202e", "\u2069", "\u2066", "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\r", "\ud800"]


def record(**changes: Any) -> TokenAnalysis:
    text = "<step_1> 1 plus 2 makes 3 <step_2> 3 plus 4 makes 9 <answer> 9"
    tokens = text.split()
    zeros = [0.0] * len(tokens)
    found = TokenAnalysis(
        problem_id="p",
        question="1 + 2 + 4",
        answer="7",
        reference="",
        response=text,
        context="<step_1> 1 plus 2 makes 3 <step_2> 3 plus 4 makes 7 <answer> 7",
        correct=False,
        first_wrong_step=None,
        wrong_tokens=None,
        tokens=tokens,
        advantage=zeros,
        kl=zeros,
        entropy=zeros,
        student_logprob=zeros,
        teacher_logprob=zeros,
    )
    return replace(found, **changes)


def labels(found: TokenAnalysis) -> list[str]:
    page = heat_map(found, context_name="critique")
    return re.findall(r'<span class="label">(.*?)</span><span class="attempt">', page)


def label(text: str, name: str = "note") -> str:
    return f'<b class="flag">{text}</b>' if name == "flag" else f'<span class="note">{text}</span>'


@pytest.mark.parametrize("correct", [False, True])
def test_no_step_is_called_right_that_nobody_judged(correct: bool) -> None:
    shorter = {"context": "<step_1> 1 plus 2 makes 3 <answer> 7"}
    longer = {"context": "<step_1> a <step_2> b <step_3> c <answer> 7"}
    for changes in ({}, shorter, longer):
        assert set(labels(record(correct=correct, **changes))) == {""}


def test_steps_that_were_judged_have_labels() -> None:
    right = label("right")
    wrong = record(wrong_tokens=(6, 12), first_wrong_step=2, steps_judged=True)
    assert labels(wrong) == [right, label("first error", "flag"), ""]
    assert labels(replace(wrong, steps_judged=False)) == labels(wrong)  # an older file
    assert labels(record(correct=True, steps_judged=True)) == [right] * 3
    # It broke off within its last step, which therefore is neither right nor wrong.
    broken = record(
        response="<step_1> 1 plus 2 makes 3 <step_2> 3 pl",
        tokens=["<step_1>", "1", "plus", "2", "makes", "3", "<step_2>", "3", "pl"],
        steps_judged=True,
    )
    assert labels(broken)[:2] == [right, ""]
    # Text without a tag is no step.
    assert labels(record(response="no idea", tokens=["no", "idea"], steps_judged=True))[0] == ""


@pytest.mark.parametrize(("kind", "judged"), [("arithmetic", True), ("jsonl", False)])
def test_an_analysis_says_whether_steps_were_judged(
    solver_dir: Path, tmp_path: Path, kind: str, judged: bool
) -> None:
    problems = ArithmeticTask(step_counts=(1,)).problems(split="test", count=2)
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in problems))
    tasks: dict[str, Any] = {
        "arithmetic": {"step_counts": [1]},
        "jsonl": {
            "name": "jsonl",
            "splits": {"test": str(path)},
            "reference": "reference",
            "instruction": "",
            "checker": "plain",
        },
    }
    config = Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": tmp_path,
            "device": "cpu",
            "task": tasks[kind],
            "method": {"name": "refsol"},
        }
    )
    solver = load_solver(config)
    attempts = sample_attempts(
        solver.engine,
        solver.context.student_prompt,
        solver.task,
        solver.task.problems(split="test", count=1),
        samples=1,
        params=SamplingParams(max_new_tokens=5),
    )
    teacher = build_teacher(config.method.teacher, solver.model)
    assert teacher is not None
    (found,) = analyze(
        solver,
        teacher,
        solver.build_method(config.method),
        attempts,
        [(0, 0)],
        lm_heads=find_lm_heads(solver.model, teacher),
    )
    assert found.steps_judged is judged


@pytest.mark.parametrize("acting", ACTING, ids=ascii)
def test_text_does_not_act_on_a_page(acting: str) -> None:
    text = f"one {acting}two"
    found = record(
        question=text,
        answer=text,
        response=f"<step_1> {text}",
        context=f"<step_1> {text} three <step_2> {text}",
        tokens=["<step_1>", " one", f" {acting}two"],
        wrong_tokens=(0, 3),
    )
    table = TextTable(text, ["", text], [[text, text]], note=text)
    page = document(
        text,
        heat_map(found, context_name=text)
        + verdict(found)
        + html_table(table, figures=False)
        + html_table(table)
        + isolated(text),
    )
    page.encode()  # it can be written
    assert not [
        character
        for character in html.unescape(page)
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    ]
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", html.unescape(page))
    assert visible(acting)[:4] in html.unescape(page)  # it is shown instead


def test_right_to_left_text_is_isolated() -> None:
    text = "\N{HEBREW LETTER ALEF}\N{HEBREW LETTER BET} 12"
    assert isolated(text) == f"<bdi>{text}</bdi>"
    assert plain(text) == text
    page = heat_map(record(tokens=[text], response=text, context=text), context_name="critique")
    assert page.count(f"<bdi>{text}</bdi>") == 2


def terminal() -> Console:
    return Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_dry_run_shows_escapes_and_obeys_none(solver_dir: Path, tmp_path: Path) -> None:
    question = "1 + \x1b[2J\x1b]0;owned\x07 \u202e 2 [bold]"
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": question, "answer": "3"}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "2 + 2", "answer": "4"}) + "\n")
    splits = {"train": str(tmp_path / "a.jsonl"), "dev": str(tmp_path / "b.jsonl")}
    task = {"name": "jsonl", "splits": splits, "checker": "plain"}
    # The arithmetic vocabulary would lose them before they are shown.
    settings = {"model": str(byte_level_solver(tmp_path)), "output_dir": tmp_path, "task": task}
    config = Config.model_validate({**settings, "method": {"name": "environment"}})
    console = terminal()
    dry_run(config, console)
    text = printed(console)
    assert r"1 + \x1b[2J\x1b]0;owned\x07 \u202e 2 [bold]" in text
    assert not re.search("\x1b(?!\\[[0-9;]*m)|\x07|\u202e", text)


def byte_level_solver(folder: Path) -> Path:
    from tiny_solvers import tiny_llama
    from tiny_tokenizers import byte_level

    tokenizer = byte_level()
    tiny_llama(tokenizer).save_pretrained(folder / "bytes")
    tokenizer.save_pretrained(folder / "bytes")
    return folder / "bytes"


def test_an_error_shows_escapes_and_obeys_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise EngineError("HTTP 400: \x1b]0;owned\x07 [bold]not bold[/bold] \ud800")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    error = capsys.readouterr().err
    assert r"error: HTTP 400: \x1b]0;owned\x07 [bold]not bold[/bold] \ud800" in error


@pytest.mark.parametrize("name", ["[/]", "[red]x[/red]", "\x1b[2J", "a[b"])
def test_names_of_folders_are_no_markup(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A bracket in a path used to end a command after its work, or to vanish."""
    folder = tmp_path / name
    folder.mkdir(parents=True)
    solver_dir.rename(folder / "solver")
    config = {
        "model": str(folder / "solver"),
        "output_dir": str(folder / "run"),
        "task": {"step_counts": [1]},
        "method": {"name": "refsol", "group_size": 1},
        "device": "cpu",
        "steps": 1,
        "prompts_per_step": 1,
        "rollout": {"max_new_tokens": 3},
        "evaluation": {"problems": 1, "samples": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    few = ["--problems", "1", "--samples", "1"]
    run = str(folder / "run")
    commands: list[list[str]] = [
        ["train", str(tmp_path / "run.yaml"), "--dry-run"],
        ["train", str(tmp_path / "run.yaml")],
        ["evaluate", run, *few],
        ["analyze", run, *few, "--attempts", "1"],
        ["compare", run, "--output", str(folder / "page")],
    ]
    for arguments in commands:
        shown = run_cli(monkeypatch, arguments)
        if arguments[0] != "evaluate":  # a table may be too narrow for the whole name
            assert visible(str(folder)) in shown.replace("\n", ""), arguments
        assert not re.search("\x1b(?!\\[[0-9;?]*[a-zA-Z])", shown)
        assert "\x1b[2J" not in shown


def run_cli(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> str:
    output = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["selfdistill", *arguments])
        patch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert caught.value.code == 0, output.getvalue()
    return output.getvalue()


def test_a_note_beside_a_bar_is_no_markup() -> None:
    console = terminal()
    with progress_bars(console) as bars:
        bars.add_task("score", total=1, note="stepalign (\x1b[2J[/])")
    assert r"stepalign (\x1b[2J[/])" in printed(console)


def test_every_acting_character_is_made_visible() -> None:
    kept = {"\n", "\t"}
    acting = {
        chr(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Cc", "Cs")
        or unicodedata.bidirectional(chr(code))
        in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    } - kept
    for character in acting:
        assert visible(f"a{character}b").isprintable(), hex(ord(character))
    others: Callable[[str], str] = visible
    assert others("a\n\tb \N{HEBREW LETTER ALEF} [x]") == "a\n\tb \N{HEBREW LETTER ALEF} [x]"
