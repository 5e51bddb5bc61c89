from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from selfdistill.context import ContextRenderer, PromptTooLongError, TeacherContext
from selfdistill.layout import common_prefix_length
from selfdistill.tasks import Problem

PROBLEM = Problem(id="p", question="one plus two", answer="3", reference="one plus two is 3")
TAGS = ["critique", "/critique", "reference", "/reference", "think", "/think"]
WORDS = ["<unk>", "<user>", "<assistant>", *(f"<{tag}>" for tag in TAGS)]
WORDS += ["one", "plus", "two", "is", "3", "so"]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %} <think> </think>{% endif %}"
    "{% endif %}"
)


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    model = WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    fast.chat_template = TEMPLATE
    return fast


def test_question_comes_first_and_context_is_tagged(words: PreTrainedTokenizerFast) -> None:
    renderer = ContextRenderer(words)
    student = renderer.student_prompt(PROBLEM)
    assert words.decode(student) == "<user> one plus two <assistant>"
    for kind in ("critique", "reference"):
        teacher = renderer.teacher_prompt(PROBLEM, TeacherContext(kind, "so 3"))
        expected = f"<user> one plus two <{kind}> so 3 </{kind}> <assistant>"
        assert words.decode(teacher) == expected
        assert common_prefix_length([student, teacher]) == 4  # <user> one plus two


def test_template_variables_belong_to_one_role(words: PreTrainedTokenizerFast) -> None:
    renderer = ContextRenderer(
        words,
        student_template={"enable_thinking": False},
        teacher_template={"enable_thinking": True},
    )
    student = words.decode(renderer.student_prompt(PROBLEM))
    teacher = words.decode(renderer.teacher_prompt(PROBLEM, TeacherContext("critique", "3")))
    assert student.endswith("<assistant> <think> </think>")
    assert teacher.endswith("</critique> <assistant>")


def test_a_group_keeps_the_rollouts_tokens(words: PreTrainedTokenizerFast) -> None:
    contexts = [TeacherContext("critique", "3"), TeacherContext("critique", "so 3")]
    renderer = ContextRenderer(words)
    group = renderer.prompt_group(PROBLEM, contexts, [[13, 0], [14]])
    assert group.student_prompt == renderer.student_prompt(PROBLEM)
    assert group.teacher_prompts == [renderer.teacher_prompt(PROBLEM, c) for c in contexts]
    assert group.completions == [[13, 0], [14]]


def test_nothing_is_cut_silently(words: PreTrainedTokenizerFast) -> None:
    contexts = [TeacherContext("critique", "3"), TeacherContext("critique", "so so 3")]
    completions = [[13, 13], [13, 13]]
    # The longer teacher prompt has 10 tokens.
    ContextRenderer(words, max_length=12).prompt_group(PROBLEM, contexts, completions)
    with pytest.raises(PromptTooLongError, match=r"teacher prompt .* rollout 1 have 12") as caught:
        ContextRenderer(words, max_length=11).prompt_group(PROBLEM, contexts, completions)
    assert (caught.value.rollout, caught.value.length, caught.value.max_length) == (1, 12, 11)
    with pytest.raises(PromptTooLongError, match="student prompt and completion of rollout 0"):
        ContextRenderer(words, max_length=6).prompt_group(PROBLEM, contexts, completions)


def test_bad_arguments_are_named(words: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_length is 0"):
        ContextRenderer(words, max_length=0)
    words.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ContextRenderer(words)
    with pytest.raises(ValueError, match="kind is 'hint'"):
        TeacherContext("hint", "3")
    with pytest.raises(ValueError, match="text of a critique is empty"):
        TeacherContext("critique", " \n")
