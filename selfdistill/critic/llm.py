"""The faithful scribe as a language model (arXiv 2606.11173, schema A-D).

The model answers in a fixed form, and only that form counts: an answer that says less, more or
something contradictory is no critique. Such a rollout gets none, and is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

from selfdistill.critic.interface import Critique, CritiqueCase
from selfdistill.critic.textgen.interface import Generation, TextGenerator
from selfdistill.tasks.interface import Problem, Verdict

PROMPT = """\
You are a scribe. You will get a question and a student's attempt at it. Write the attempt out \
again, and change nothing in it but what is wrong.

First decide which case it is.
A: the attempt is right and complete. Every step holds, and the final answer is right. Copy all of \
it exactly.
B: the final answer is right, but a step that it rests on is missing or is not justified. Copy the \
attempt exactly and insert the missing step where it belongs.
C: the attempt breaks off before its final answer, and what is there is right. Condense what is \
there if it is long, keeping the student's words, and finish it.
D: a step is wrong, or the final answer is. Copy everything before the earliest error exactly. \
Do not copy the wrong step. Write the right step in its place, in the student's manner, and go on \
from there to the right final answer.

Rules
- What is right stays as it is, word for word: signs, spaces, tags and numbers of steps included. \
Do not improve its style.
- Never quote, mention or hint at an error. Your text must read as if the student had written it \
at once.
- Keep to the student's format, and give the final answer in the way that the student or the \
question gives it.

Answer in exactly this form, with nothing before or after it:
<case>A, B, C or D</case>
<first_change>the number of the first step that you wrote or changed, counted from 1; 0 in case A\
</first_change>
<text>
the attempt, written out again
</text>

<question>
{question}
</question>
{reference}<attempt>
{attempt}
</attempt>
"""

REFERENCE = """\
<solution>
{reference}
</solution>
The solution is for you alone: use it to find errors, but keep to the student's way of solving.
"""

SHORTEST_PROMPT = PROMPT.format(question="", reference="", attempt="")

_FORM = re.compile(
    r"\s*<case>\s*(?P<case>[A-D])\s*</case>"
    r"\s*<first_change>\s*(?P<step>\d{1,4})\s*</first_change>"
    r"\s*<text>(?P<text>.*)</text>\s*",
    re.DOTALL,
)


class CritiqueError(ValueError):
    """A critic's answer that is no critique."""


def strip_thinking(text: str) -> str:
    """Return what follows the last think part; nothing when one was never closed.

    Templates may open the think part in the prompt, so a closing tag alone ends one, too.
    """
    text = text.rpartition("</think>")[2]
    return "" if "<think>" in text else text


def parse_critique(answer: str, response: str) -> Critique:
    """Read a critic's answer.

    Args:
        answer: what the critic wrote, think parts included.
        response: the student's attempt; in case A its own text is taken, which cannot be miscopied.

    Raises:
        CritiqueError: the answer does not have the form that `PROMPT` asks for, or contradicts
            itself.
    """
    match = _FORM.fullmatch(strip_thinking(answer))
    if match is None:
        raise CritiqueError("the answer does not have the form <case>, <first_change>, <text>")
    case = cast(CritiqueCase, match["case"])
    step = int(match["step"])
    text = match["text"].strip()
    if "<text>" in text or "</text>" in text:
        raise CritiqueError("the answer has more than one <text>")
    if (case == "A") != (step == 0):
        raise CritiqueError(f"case {case} with first_change {step}")
    if case == "A":
        text = response.strip()
    if not text:
        raise CritiqueError("the text is empty")
    return Critique(case, text, step or None)


class LLMCritic:
    """Asks a frozen model for a critique of each attempt (implements `Critic`).

    Args:
        generator: the model, which answers greedily.
        check: judges texts as answers to their problems, all at once; a critique that ends in a
            wrong answer is none. None takes every critique that has the right form.
        show_reference: the critic sees the reference solution where the problem has one.

    Attributes:
        unusable: how many answers of the last call were no critique, by reason.
    """

    def __init__(
        self,
        generator: TextGenerator,
        *,
        check: Callable[[Sequence[tuple[Problem, str]]], list[Verdict]] | None = None,
        show_reference: bool = False,
    ) -> None:
        self._generator = generator
        self._check = check
        self._show_reference = show_reference
        self.unusable: Counter[str] = Counter()

    def critique(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> list[Critique | None]:
        """Return one critique per (problem, response) pair, or None where there is no usable one.

        Raises:
            ValueError: the two sequences differ in length.
            EngineError: the model cannot be reached or died.
        """
        prompts = [
            self.prompt(p, response) for p, response in zip(problems, responses, strict=True)
        ]
        critiques: list[Critique | None] = [None] * len(prompts)
        self.unusable = Counter()
        for place, generation in self._generator.generate(prompts):
            critiques[place] = self._read(responses[place], generation)
        self._leave_out_wrong(problems, critiques)
        return critiques

    def prompt(self, problem: Problem, response: str) -> str:
        """Return what the critic is asked about one attempt."""
        reference = problem.reference.strip() if self._show_reference else ""
        return PROMPT.format(
            question=problem.question,
            reference=REFERENCE.format(reference=reference) if reference else "",
            attempt=response,
        )

    def _read(self, response: str, generation: Generation) -> Critique | None:
        try:
            return parse_critique(generation.text, response)
        except CritiqueError as error:
            reason = str(error) if generation.finished else "the length limit cut the answer off"
            self.unusable[reason] += 1
            return None

    def _leave_out_wrong(
        self, problems: Sequence[Problem], critiques: list[Critique | None]
    ) -> None:
        """Replace critiques whose own final answer is wrong by None."""
        if self._check is None:
            return
        usable = [(place, critique.text) for place, critique in enumerate(critiques) if critique]
        verdicts = self._check([(problems[place], text) for place, text in usable])
        for (place, _), verdict in zip(usable, verdicts, strict=True):
            if not verdict.correct:
                self.unusable["the critique's own final answer is wrong"] += 1
                critiques[place] = None
