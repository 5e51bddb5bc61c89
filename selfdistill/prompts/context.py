"""The only place that renders prompts, for the student and for the teacher.

Both get one user turn through the tokenizer's chat template, question first:

    student   question
              instruction of the task, if it has one
    teacher   question
              instruction
              <critique>
              ...
              </critique>                                       (or <reference>, <feedback>)

or what templates of the configuration make of these, after a system turn and solved questions where
it has some. So their longest common token prefix is the template's head, the question and the
instruction. All text of problems, models and critics is tokenised by `selfdistill.prompts.chat`:
nothing that it says can become a control token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from transformers import PreTrainedTokenizerBase

from selfdistill.config import PromptConfig
from selfdistill.errors import UserError
from selfdistill.model.layout import PromptGroup
from selfdistill.prompts.chat import ChatTemplate
from selfdistill.tasks.interface import Problem

ContextKind = Literal["critique", "reference", "feedback"]


@dataclass(frozen=True)
class TeacherContext:
    """What the teacher sees and the student does not.

    Attributes:
        kind: names the tag around the text.
        text: the critique, a solution of the problem or what the checker says, not empty.
        wrong_span: characters (start, stop) of the attempt's first wrong step, as the author of the
            text says; None where there is none, or nobody asked.
        contrast: another text of the same kind, which the teacher sees in place of this one when
            its judgement is to be subtracted; None where nothing is subtracted.

    Raises:
        ValueError: an unknown kind or an empty text.
    """

    kind: ContextKind
    text: str
    wrong_span: tuple[int, int] | None = None
    contrast: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ContextKind):
            raise ValueError(f"kind is {self.kind!r}, expected one of {get_args(ContextKind)}")
        if not self.text.strip():
            raise ValueError(
                f"text of a {self.kind} is empty, so teacher and student would know the same: "
                "leave that rollout out"
            )


class PromptTooLongError(UserError):
    """A prompt with its completion does not fit; nothing is ever cut silently.

    Attributes:
        rollout: which rollout of the group.
        length: tokens of prompt and completion together.
        max_length: the limit.
    """

    def __init__(self, role: str, *, rollout: int, length: int, max_length: int) -> None:
        super().__init__(
            f"{role} prompt and completion of rollout {rollout} have {length} tokens, expected at "
            f"most {max_length}: raise max_length, shorten the context, or leave the rollout out"
        )
        self.rollout = rollout
        self.length = length
        self.max_length = max_length


class ContextRenderer:
    """Renders problems and contexts as token ids.

    Args:
        tokenizer: with a chat template.
        settings: templates and their variables, turns before the question, the date. Student and
            teacher may end differently; what they share is decided by their tokens.
        instruction: said after each question, see `selfdistill.tasks.interface.Task`.
        max_length: most tokens that a prompt and its completion may have together; None: no limit.

    Attributes:
        max_length: the one that was given.

    Raises:
        ValueError: max_length is not positive.
        UnusableModelError: see `ChatTemplate`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: PromptConfig | None = None,
        *,
        instruction: str = "",
        max_length: int | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}, expected at least 1 or None")
        settings = settings or PromptConfig()
        self._instruction = instruction
        self.max_length = max_length
        self._write_question = _question_writer(settings.question)
        self._write_context = _context_writer(settings.context)
        before = [] if settings.system is None else [("system", settings.system)]
        for shot in settings.few_shot:
            question = self._write_question(question=shot.question, instruction=instruction)
            before += [("user", question), ("assistant", shot.answer)]
        self._student_chat = ChatTemplate(
            tokenizer, settings.student_template, today=settings.date, before=before
        )
        self._teacher_chat = self._student_chat.with_variables(settings.teacher_template)

    @property
    def writes_date(self) -> bool:
        """Whether the chat template writes the date into a prompt."""
        return self._student_chat.writes_date or self._teacher_chat.writes_date

    @property
    def largest_token(self) -> int:
        """The largest token id that a prompt may have."""
        return max(self._student_chat.largest_token, self._teacher_chat.largest_token)

    def student_prompt(self, problem: Problem) -> list[int]:
        """Return the question, the instruction and the generation prompt as token ids."""
        return self._student_chat.encode(self._question(problem))

    def teacher_prompt(self, problem: Problem, context: TeacherContext) -> list[int]:
        """Return what the student reads, with the tagged context after the instruction."""
        block = self._write_context(kind=context.kind, text=context.text)
        return self._teacher_chat.encode(self._question(problem), block)

    def contrast_prompt(self, problem: Problem, context: TeacherContext) -> list[int]:
        """Return `teacher_prompt` with the other text, or the same one where there is no other."""
        other = context.text if context.contrast is None else context.contrast
        return self.teacher_prompt(problem, replace(context, text=other))

    def leaves_room(self, problem: Problem, *, max_new_tokens: int) -> bool:
        """True when a completion of that length fits behind the student's prompt."""
        if self.max_length is None:
            return True
        return len(self.student_prompt(problem)) + max_new_tokens <= self.max_length

    def fits(
        self, problem: Problem, context: TeacherContext | None, completion: Sequence[int]
    ) -> bool:
        """True when a completion fits behind the student's prompt and behind the teacher's."""
        if self.max_length is None:
            return True
        prompts = [self.student_prompt(problem)]
        if context is not None:
            prompts.append(self.teacher_prompt(problem, context))
            if context.contrast is not None:
                prompts.append(self.contrast_prompt(problem, context))
        return max(map(len, prompts)) + len(completion) <= self.max_length

    def prompt_group(
        self,
        problem: Problem,
        contexts: Sequence[TeacherContext | None],
        completions: Sequence[Sequence[int]],
        *,
        rewards: Sequence[float] | None = None,
        old_logprobs: Sequence[Sequence[float]] | None = None,
        steps: Sequence[Sequence[int]] | None = None,
        wrong: Sequence[Sequence[bool]] | None = None,
    ) -> PromptGroup:
        """Return one problem's group, ready to be scored.

        Args:
            problem: what all rollouts answer.
            contexts: one for each rollout; with None the teacher sees what the student sees.
            completions: the rollouts' own token ids, never re-tokenised text.
            rewards, old_logprobs, steps, wrong: of the rollouts, see `PromptGroup`.

        Raises:
            PromptTooLongError: a prompt and its completion exceed `max_length`.
            ValueError: see `PromptGroup`.
        """
        student_prompt = self.student_prompt(problem)
        group = PromptGroup(
            student_prompt=student_prompt,
            teacher_prompts=[
                student_prompt if context is None else self.teacher_prompt(problem, context)
                for context in contexts
            ],
            completions=[list(completion) for completion in completions],
            rewards=None if rewards is None else list(rewards),
            old_logprobs=None if old_logprobs is None else [list(row) for row in old_logprobs],
            steps=None if steps is None else [list(row) for row in steps],
            wrong=None if wrong is None else [list(row) for row in wrong],
            contrast_prompts=[self.contrast_prompt(problem, c) for c in contexts if c is not None]
            if any(context is not None and context.contrast for context in contexts)
            else None,
        )
        if self.max_length is not None:
            for i, completion in enumerate(group.completions):
                prompts = [("student", group.student_prompt), ("teacher", group.teacher_prompts[i])]
                if group.contrast_prompts is not None:
                    prompts.append(("teacher", group.contrast_prompts[i]))
                for role, prompt in prompts:
                    length = len(prompt) + len(completion)
                    if length > self.max_length:
                        raise PromptTooLongError(
                            role, rollout=i, length=length, max_length=self.max_length
                        )
        return group

    def _question(self, problem: Problem) -> str:
        return self._write_question(question=problem.question, instruction=self._instruction)


def _question_writer(template: str | None) -> Callable[..., str]:
    if template is None:
        return lambda question, instruction: f"{question}\n\n{instruction}".strip()
    from selfdistill.prompts.templates import TextTemplate

    named = TextTemplate(template, setting="prompt.question", needs="question", knows="instruction")
    return named.render


def _context_writer(template: str | None) -> Callable[..., str]:
    if template is None:
        return lambda kind, text: f"<{kind}>\n{text}\n</{kind}>"
    from selfdistill.prompts.templates import TextTemplate

    return TextTemplate(template, setting="prompt.context", needs="text", knows="kind").render
