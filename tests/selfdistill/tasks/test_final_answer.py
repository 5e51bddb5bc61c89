from __future__ import annotations

import pytest

from selfdistill.tasks.final_answer import read_answer, read_boxes


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<step_1> 2 + 3 = 5 <answer> 6", "6"),
        ("<answer>6</answer>", "6"),
        ("<ANSWER> 6 </Answer> bye", "6"),
        ("<answer>\n 6\nBecause I said so.", "6"),
        ("<answer> 5 <answer> 6", "6"),
        (r"<answer> \boxed{6}", r"\boxed{6}"),
        ("<answer>\n\\[\n18\n\\]\n", r"\[ 18 \]"),
        ("<answer>\n$$\n18\n$$", "$$ 18 $$"),
        ("<answer> \\[ 18 \\] or so", r"\[ 18 \]"),
        ("<answer>\n```\n18\n```", "18"),
        (
            "<answer> \\begin{pmatrix}\n1 \\\\\n2\n\\end{pmatrix}",
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        ),
        (r"\boxed{5} <answer>", None),
        ("<answer> </answer> 5", None),
        (r"so \boxed{5}, no: \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"it is \boxed{5}, or rather \boxed{\frac{1}{", "5"),
        (r"\boxed{\frac{1}{2}", None),
        (r"\fbox{5}", "5"),
        ("\\boxed{5}\nThe answer is nice.", "5"),
        ("2 * 9 = 18\n#### 18", "18"),
        ("#### 17\n#### 18 \n", "18"),
        ("The answer is 18.", "18"),
        ("Thus the final answer is: **18** dollars. Well done!", "18** dollars"),
        ("**Answer:** 18", "18"),
        ("**Answer**: 18", "18"),
        ("The answer to the question is $18.50 because 1 + 1 = 2.", "$18.50"),
        ("The answer is\n\\[\n18\n\\]", r"\[ 18 \]"),
        ("The answer is 5. No: the answer is 6.", "6"),
        ("The answer is therefore 18.", "18"),
        ("The answer, then, is 18", "18"),
        ("The answers are 1 and 2.", "1 and 2"),
        ("**Answers:** 1, 2", "1, 2"),
        ("The answers to the problem are $x = 1$ and $x = 2$.", "$x = 1$ and $x = 2$"),
        ("The answer would be 18.", "18"),
        ("So the final answer should be **18**, because 2 * 9 = 18.", "18"),
        ("The answer to this question will then be 18", "18"),
        ("The answer must, therefore, be 18", "18"),
        ("The answer would be\n\\[\n18\n\\]", r"\[ 18 \]"),
        # What is said of answers besides does not hide the one that is stated.
        ("The answer is 18. All answers are integers.", "18"),
        ("The answer is 18. Without the tax the answer would be 16.", "18"),
        ("The answer would be 16 without tax. With it, the answers are 17 and 18.", "17 and 18"),
        ("The answers differ.", None),
        ("The answer would surprise you.", None),
        ("The answer is", None),
        ("I have no answer.", None),
        ("6", None),
        ("", None),
    ],
)
def test_the_answer_is_read_from_tag_box_hashes_or_sentence(
    response: str, answer: str | None
) -> None:
    assert read_answer(response) == answer


def test_boxes_are_read_whole_and_in_order() -> None:
    assert read_boxes(r"\boxed{a\{b\}} x \boxed{} y \boxed{\boxed{c}}") == [
        r"a\{b\}",
        "",
        r"\boxed{c}",
    ]


def test_a_configuration_chooses_the_forms() -> None:
    text = "\\boxed{1}\n#### 2\nThe answer is 3\nResult = 4 m\n<answer> 5"
    assert read_answer(text) == "5"
    for forms, answer in [
        (["hashes", "boxed"], "2"),
        (["phrase"], "3"),
        ([r"^Result = (\d+)", "tag"], "4"),
        ([r"^Nothing (\d+)", "boxed"], "1"),
    ]:
        assert read_answer(text, forms) == answer
    assert read_answer("#### 2", ["boxed"]) is None
