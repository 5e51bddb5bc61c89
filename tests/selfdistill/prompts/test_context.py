from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from selfdistill.config import ConfigError, PromptConfig
from selfdistill.model.folder import UnusableModelError
from selfdistill.model.layout import common_prefix_length, pack_groups
from selfdistill.prompts.context import ContextRenderer, PromptTooLongError, TeacherContext
from selfdistill.tasks.interface import Problem

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
        PromptConfig(
            student_template={"enable_thinking": False}, teacher_template={"enable_thinking": True}
        ),
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
    with pytest.raises(UnusableModelError, match="no chat template"):
        ContextRenderer(words)
    with pytest.raises(ValueError, match="kind is 'hint'"):
        TeacherContext("hint", "3")
    with pytest.raises(ValueError, match="text of a critique is empty"):
        TeacherContext("critique", " \n")


# As ChatML models with a thinking switch have it: thinking off writes an empty think part.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
HEAD = "<|im_start|>user\n"
TAIL = "<|im_end|>\n<|im_start|>assistant\n"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    """Return a byte-level ChatML tokenizer in which "?" and a line break are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate([*alphabet, "?Ċ"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("?", "Ċ")]))
    # As GPT-4's and Qwen's: punctuation keeps the line breaks that follow it.
    pieces = pre_tokenizers.Split(Regex(r"[^\s\w]+[\r\n]*|\w+|\s"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.add_tokens(["<think>", "</think>"])
    fast.chat_template = CHATML
    return fast


def renderer_of(tokenizer: PreTrainedTokenizerFast) -> ContextRenderer:
    return ContextRenderer(
        tokenizer,
        PromptConfig(
            student_template={"enable_thinking": False}, teacher_template={"enable_thinking": True}
        ),
        instruction="End with <answer>.",
    )


def test_thinking_is_off_for_the_student_and_on_for_the_teacher(
    chatml: PreTrainedTokenizerFast,
) -> None:
    renderer = renderer_of(chatml)
    question = "one plus two\n\nEnd with <answer>."
    student = renderer.student_prompt(PROBLEM)
    assert chatml.decode(student) == HEAD + question + TAIL + EMPTY_THOUGHT
    thought = chatml.convert_tokens_to_ids(["<think>", "</think>"])
    assert [token for token in student if token in thought] == thought

    teacher = renderer.teacher_prompt(PROBLEM, TeacherContext("critique", "so 3"))
    block = "\n<critique>\nso 3\n</critique>"
    assert chatml.decode(teacher) == HEAD + question + block + TAIL
    assert not set(thought) & set(teacher)
    shared = common_prefix_length([student, teacher])
    assert chatml.decode(student[:shared]) == HEAD + question


def test_tokens_decide_what_is_shared(chatml: PreTrainedTokenizerFast) -> None:
    # The texts agree up to and including "?"; a tokenizer may join it with the line break.
    problem = Problem(id="p", question="one?", answer="1", reference="1")
    renderer = ContextRenderer(chatml)
    student = renderer.student_prompt(problem)
    teacher = renderer.teacher_prompt(problem, TeacherContext("reference", "1"))
    shared = common_prefix_length([student, teacher])
    assert student[:shared] == teacher[:shared]
    assert student[shared] != teacher[shared]
    assert chatml.decode(student[:shared]) in (HEAD + "one", HEAD + "one?")


def test_an_end_of_turn_among_the_completion_is_scored(chatml: PreTrainedTokenizerFast) -> None:
    # It is also the padding token of many tokenizers: masks that ask for it would lose it.
    chatml.pad_token = chatml.eos_token
    end = chatml.eos_token_id
    group = renderer_of(chatml).prompt_group(
        PROBLEM, [TeacherContext("critique", "so 3")], [[40, end]]
    )
    pack = pack_groups([group], share_student_prefix=False)
    assert pack.targets.tolist() == [40, end]


def test_what_fits_is_known_beforehand(words: PreTrainedTokenizerFast) -> None:
    context = TeacherContext("critique", "so so 3")
    renderer = ContextRenderer(words, max_length=11)  # student 5, teacher 10 tokens
    assert renderer.leaves_room(PROBLEM, max_new_tokens=6)
    assert not renderer.leaves_room(PROBLEM, max_new_tokens=7)
    assert renderer.fits(PROBLEM, context, [13])
    assert not renderer.fits(PROBLEM, context, [13, 13])
    assert renderer.fits(PROBLEM, None, [13, 13])
    renderer.prompt_group(PROBLEM, [context], [[13]])
    with pytest.raises(PromptTooLongError):
        renderer.prompt_group(PROBLEM, [context], [[13, 13]])
    # What the teacher sees when its judgement is subtracted is a prompt like the other.
    short = TeacherContext("critique", "3", contrast="so so 3")
    assert renderer.fits(PROBLEM, short, [13])
    assert not renderer.fits(PROBLEM, short, [13, 13])
    group = renderer.prompt_group(PROBLEM, [short], [[13]])
    assert group.contrast_prompts == [renderer.teacher_prompt(PROBLEM, context)]
    with pytest.raises(PromptTooLongError):
        renderer.prompt_group(PROBLEM, [short], [[13, 13]])
    assert renderer.prompt_group(PROBLEM, [context], [[13]]).contrast_prompts is None
    unlimited = ContextRenderer(words)
    assert unlimited.fits(PROBLEM, context, [13] * 1000)
    assert unlimited.leaves_room(PROBLEM, max_new_tokens=1000)


def test_templates_of_ones_own_system_turn_and_solved_questions(
    words: PreTrainedTokenizerFast,
) -> None:
    settings = PromptConfig.model_validate(
        {
            "system": "so",
            "few_shot": [{"question": "one", "answer": "3"}],
            "question": "two {{ question }} {{ instruction }}",
            "context": "<think> {{ kind }} {{ text }}",
        }
    )
    words.chat_template = TEMPLATE
    renderer = ContextRenderer(words, settings, instruction="is")
    student = words.decode(renderer.student_prompt(PROBLEM))
    # `system` and `kind` are words that this vocabulary does not know.
    before = "<unk> so <user> two one is <assistant> 3 <user> two one plus two is"
    assert student == f"{before} <assistant>"
    teacher = words.decode(renderer.teacher_prompt(PROBLEM, TeacherContext("critique", "so 3")))
    assert teacher == f"{before} <think> <unk> so 3 <assistant>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"question": "{{ quest }} {{ question }}"}, r"prompt\.question asks for quest"),
        ({"question": "Solve it."}, r"prompt\.question does not write the question"),
        ({"context": "{{ text"}, r"prompt\.context is no Jinja template"),
        ({"context": "{{ text.__class__.__mro__ }}"}, r"prompt\.context fails with SecurityError"),
    ],
)
def test_templates_that_do_not_do_are_refused(
    words: PreTrainedTokenizerFast, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ContextRenderer(words, PromptConfig.model_validate(settings)).teacher_prompt(
            PROBLEM, TeacherContext("critique", "3")
        )
