from __future__ import annotations

import pytest

from selfdistill.tasks.answers.normalize import (
    MOST_CHARACTERS,
    drop_box,
    drop_delimiters,
    drop_final_stop,
    drop_lead_in,
    drop_markdown,
    join_digit_groups,
    latex_in_one_spelling,
    normalize,
    plain_code_as_latex,
    unicode_as_latex,
)


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        (unicode_as_latex, "x²", "x^{2}"),
        (unicode_as_latex, "a₁₂", "a_{12}"),
        (unicode_as_latex, "2½", "2 1/2"),
        (unicode_as_latex, "3√(x+(1))", r"3\sqrt{x+(1)}"),
        (unicode_as_latex, "∛8", r"\sqrt[3]{8}"),
        (unicode_as_latex, "\uff11\uff18\u202f°\u200b", r"18 ^{\circ}"),
        (drop_markdown, "**18** and *19*", "18 and 19"),
        (drop_markdown, "2**3*4", "2**3*4"),
        (drop_markdown, "`x*y`", "x*y"),
        (drop_markdown, "a_1 + b_1", "a_1 + b_1"),
        (drop_markdown, "# 18", "18"),
        (drop_delimiters, "$18$ dollars", "18 dollars"),
        (drop_delimiters, "$18 or $19", "$18 or $19"),
        (drop_delimiters, r"\(x\) or \[y\] or $$z$$", "x or y or z"),
        (drop_box, r"so \boxed{\frac{1}{2}}!", r"\frac{1}{2}"),
        (drop_box, r"\boxed{1}+\boxed{2}", r"\boxed{1}+\boxed{2}"),
        (drop_lead_in, "Thus, the final answer is: 18", "18"),
        (drop_lead_in, "= 18", "18"),
        (drop_lead_in, "the answer is", "the answer is"),
        (drop_lead_in, "island", "island"),
        (drop_final_stop, "18.", "18"),
        (drop_final_stop, "0.333...", "0.333..."),
        (join_digit_groups, r"1\,234\,567", "1234567"),
        (join_digit_groups, "1 234", "1234"),
        (join_digit_groups, "1{,}234.5", "1234.5"),
        (join_digit_groups, "1.234.567", "1234567"),
        (join_digit_groups, "1,234 and 1.234 and 12 34", "1,234 and 1.234 and 12 34"),
        (join_digit_groups, "2 100/300", "2 100/300"),
        (latex_in_one_spelling, r"\left(\dfrac12\,\tfrac{3}4\right)", r"(\frac{1}{2} \frac{3}{4})"),
        (latex_in_one_spelling, r"18\text{ cm}^2", "18 cm^2"),
        (latex_in_one_spelling, r"\textbf{\text{(A)}}", " (A)"),
        (latex_in_one_spelling, r"30^\circ", r"30^{\circ}"),
        (latex_in_one_spelling, r"50\%", "50%"),
        (latex_in_one_spelling, r"(1\\ 2)", r"(1\\ 2)"),
        (plain_code_as_latex, "2**sqrt(2)", r"2^\sqrt{2}"),
        (plain_code_as_latex, "{1, 2}", r"\{1, 2\}"),
        (plain_code_as_latex, "sin(2pi)", r"\sin(2\pi )"),
        (plain_code_as_latex, "a sinner", "a sinner"),
    ],
)  # fmt: skip
def test_each_step_does_one_thing(step: object, before: str, after: str) -> None:
    assert callable(step)
    assert step(before) == after


def test_dress_under_dress_comes_off() -> None:
    assert normalize("  **The answer is $\\boxed{\\text{18 dollars}}$.**\n") == "18 dollars"
    assert normalize("") == ""


def test_long_texts_keep_all_but_spaces() -> None:
    text = "**" + "a " * MOST_CHARACTERS + "**"
    assert normalize(text) == " ".join(text.split())
