"""The exact scribe: a program as critic, for tasks whose steps can be checked and written.

It follows the A-D schema of arXiv 2606.11173 to the letter, so that what the teacher sees differs
from the student's attempt where that attempt is wrong and nowhere else.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from selfdistill.critic.interface import Critique, CritiqueCase
from selfdistill.tasks.interface import MistakenTask, Problem, SteppedTask, Verdict

Copying = Literal["partial_repetition", "full_repetition", "omission"]


class ScribeCritic:
    """Rewrites an attempt and changes only what is wrong (implements `Critic`).

    - A, fully correct: the attempt, verbatim.
    - B, right answer but a step missing or unjustified: the missing step inserted, the rest
      verbatim; where inserting does not mend it, as D.
    - C, incomplete but right so far: the attempt's whole steps, then the rest up to the answer.
    - D, wrong: the right steps verbatim, up to and not including the first wrong one; that step
      written anew in the attempt's own wording; then on to the answer.

    That is `copying="partial_repetition"`. Two variants show why (arXiv 2606.11173 explains them by
    induction heads, which copy what followed the same words in the context). With k the first wrong
    or unwritten step, they change one thing each:

    - "full_repetition" quotes the wrong step k as it is, too, and goes on with the right steps from
      k + 1: the teacher copies the error instead of disputing it (positive advantage all over, so
      the error is reinforced). An attempt without a wrong step is critiqued as ever.
    - "omission" leaves the trace out and starts at step k: the teacher has nothing to copy before
      it and drifts to wording of its own (negative advantage on right steps). Where nothing is left
      to write, the critique is empty.

    Args:
        task: checks and writes steps.
        copying: what is repeated of an attempt.
        error_rate: the share of critiques in which one step, drawn at random, is wrong, and which
            go on from its result. Whether and where follows from problem and attempt alone, so
            that a run that goes on hears the same.

    Raises:
        TypeError: it is to err, and the task cannot write mistakes.
    """

    def __init__(
        self,
        task: SteppedTask,
        *,
        copying: Copying = "partial_repetition",
        error_rate: float = 0.0,
    ) -> None:
        if error_rate and not isinstance(task, MistakenTask):
            raise TypeError(
                f"error_rate is {error_rate}, but the {task.name} task cannot write mistakes: set "
                "it to 0, or let the task implement `MistakenTask`"
            )
        self.task = task
        self.copying = copying
        self.error_rate = error_rate
        self.unusable: Counter[str] = Counter()  # a program's critiques all are usable

    def critique(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Critique]:
        """Return one critique per (problem, response) pair, in order.

        Raises:
            ValueError: the two sequences differ in length.
        """
        if len(problems) != len(responses):
            raise ValueError(
                f"responses: got {len(responses)} for {len(problems)} problems, "
                "expected one response for each problem (repeat a problem for its rollouts)"
            )
        return [self._one(p, response) for p, response in zip(problems, responses, strict=True)]

    def _one(self, problem: Problem, response: str) -> Critique:
        critique = self._right(problem, response)
        draw = random.Random(f"scribe/{problem.id}/{response}")
        if draw.random() >= self.error_rate:
            return critique
        assert isinstance(self.task, MistakenTask)
        text = self.task.mistake(problem, critique.text, at=draw.random())
        return replace(critique, text=text)

    def _right(self, problem: Problem, response: str) -> Critique:
        verdict = self.task.check(problem, response)
        if verdict.strict:
            return Critique("A", "" if self.copying == "omission" else response, None)
        first = len(self.task.leading_steps(problem, response)) + 1
        return Critique(_case(verdict), self._text(problem, response, verdict, first), first)

    def _text(self, problem: Problem, response: str, verdict: Verdict, first: int) -> str:
        kept = self.task.leading_steps(problem, response)
        if self.copying == "omission":
            kept = []
        elif self.copying == "full_repetition" and verdict.wrong_span is not None:
            kept, first = [*kept, response[slice(*verdict.wrong_span)]], first + 1
            quoted = " ".join(kept)
            if self.task.check(problem, quoted).complete:  # it was the answer that was wrong
                return quoted
        elif verdict.correct:
            inserted = self._insert_missing(problem, response, verdict)
            if inserted is not None:
                return inserted
        return " ".join([*kept, *self.task.write_steps(problem, first=first, like=response)])

    def _insert_missing(self, problem: Problem, response: str, verdict: Verdict) -> str | None:
        """Insert steps until the response holds; None when something else than that is wrong."""
        text = response
        while not verdict.strict:
            if verdict.wrong_span is None or verdict.first_wrong_step is None:
                return None
            right = self.task.write_steps(problem, first=verdict.first_wrong_step, like=response)
            if len(right) == 1:  # only the answer is left: nothing can be missing before it
                return None
            at = verdict.wrong_span[0]
            text = f"{text[:at]}{right[0]} {text[at:]}"
            verdict = self.task.check(problem, text)
        return text


def _case(verdict: Verdict) -> CritiqueCase:
    if verdict.correct:
        return "B"
    return "C" if verdict.first_wrong_step is None else "D"
