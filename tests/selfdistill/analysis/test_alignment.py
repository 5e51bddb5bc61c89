from __future__ import annotations

from token_records import make_record

from selfdistill.analysis.alignment import align


def test_steps_are_paired_by_their_tags() -> None:
    skipped = make_record(
        tokens=["<step_2>", "3", "4", "<answer>", "3", "4"],
        response="<step_2> 34 <answer> 34",
        context="<step_1> 34 <step_2> 42 <answer> 42",
    )
    assert align(skipped) == [
        (None, "", "<step_1> 34"),
        (range(3), "<step_2> 34", "<step_2> 42"),
        (range(3, 6), "<answer> 34", "<answer> 42"),
    ]
    spelled = make_record(
        tokens=["<", "step", "_1>", " so", " <", "step", "_2>", " on", "<eos>"],
        response="<step_1> so <step_2> on",
        context="<step_1> so <step_2> off <step_3> end",
    )
    assert align(spelled) == [
        (range(4), "<step_1> so", "<step_1> so"),
        (range(4, 9), "<step_2> on", "<step_2> off"),
        (None, "", "<step_3> end"),
    ]
    empty = make_record(tokens=["<eos>"], response="", context="<answer> 42", wrong_tokens=None)
    assert align(empty) == [(range(1), "", "<answer> 42")]
