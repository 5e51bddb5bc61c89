"""What a run would only find out later: splits, the checker on the data, the critic's answer."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.config import Config, LLMCriticConfig
from selfdistill.critic.textgen.build import build_text_generator
from selfdistill.model.device import resolve_device
from selfdistill.prompts.context import ContextRenderer
from selfdistill.tasks.build import held_out_problems
from selfdistill.tasks.interface import SPLITS, Problem, Task, check_all


def split_sizes(task: Task) -> str:
    """Say how many problems each split has."""
    sizes = ((split, task.size(split)) for split in SPLITS)
    parts = (f"{split} {'without end' if size is None else size}" for split, size in sizes)
    return f"Problems: {', '.join(parts)}."


def held_out(config: Config, task: Task, renderer: ContextRenderer) -> str:
    """Say whether the evaluations of the run have problems, and how long these are.

    Raises:
        TaskError: there is no dev problem.
    """
    problems = held_out_problems(task, split="dev", count=config.evaluation.problems)
    room = config.rollout.max_new_tokens
    longest = max(len(renderer.student_prompt(problem)) for problem in problems)
    too_long = sum(not renderer.leaves_room(p, max_new_tokens=room) for p in problems)
    return (
        f"Evaluations ask {len(problems)} dev problems, whose prompts have {longest} tokens at "
        f"most; {too_long} leave no room for {room} new tokens."
    )


def known_answers(task: Task, problems: Sequence[Problem]) -> str:
    """Say what the checker thinks of the data's own solutions; a reward of one's own is tried, too.

    Raises:
        TaskError: a reward of one's own fails.
    """
    known = [(p, p.reference or p.answer) for p in problems if p.reference or p.answer]
    if not known:
        verdict = check_all(task, [(problems[0], "")])[0]
        return f"Of an empty response to the first problem the reward is {verdict.reward:g}."
    verdicts = check_all(task, known)
    right = sum(verdict.correct for verdict in verdicts)
    what = "solutions" if any(problem.reference for problem in problems) else "bare answers"
    note = ""
    if right < len(known):
        wrong = next(p for (p, _), v in zip(known, verdicts, strict=True) if not v.correct)
        note = f" Not that of problem {wrong.id!r}, for one: {wrong.reference or wrong.answer:.200}"
    return f"Of {len(known)} {what} in the data the checker finds {right} right.{note}"


def critics_answer(config: Config, problem: Problem) -> str:
    """Ask the configured critic about a stand-in for an attempt, and say what it answered.

    Raises:
        EngineError: it cannot start, or a server gave no answer.
    """
    critic = getattr(config.method, "critic", None)
    if not isinstance(critic, LLMCriticConfig):
        return "--ask-critic: the critic of this run is no language model."
    from selfdistill.critic.llm import CritiqueError, LLMCritic, parse_critique

    generator = build_text_generator(
        critic.engine, device=resolve_device(config.device), today=config.prompt.date
    )
    attempt = problem.reference or problem.answer or "I do not know."
    prompt = LLMCritic(generator, show_reference=critic.show_reference).prompt(problem, attempt)
    ((_, answer),) = generator.generate([prompt])
    try:
        critique = parse_critique(answer.text, attempt)
        outcome = f"which is a critique of case {critique.case}"
    except CritiqueError as error:
        outcome = f"which is no usable critique: {error}"
    return f"The critic was shown {attempt!r:.200} and answered\n{answer.text}\n{outcome}.\n"
