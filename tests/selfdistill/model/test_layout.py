from __future__ import annotations

import pytest
import torch

from selfdistill.model.layout import (
    PackedRow,
    PackingStatistics,
    PromptGroup,
    common_prefix_length,
    pack_groups,
)

GROUP = PromptGroup(
    student_prompt=[1, 2, 3, 9],
    teacher_prompts=[[1, 2, 3, 5, 6, 9], [1, 2, 3, 5, 7, 7, 9]],
    completions=[[20, 21, 22], [30]],
)


def sequence_of_each_prediction(row: PackedRow, student: PackedRow) -> list[list[int]]:
    """Return the tokens that each predicting position can see, in the order of its keys."""
    own_ids = row.input_ids[0].tolist()
    borrowed_ids = student.input_ids[0, row.borrowed_index].tolist()
    seen = []
    for position in row.prediction_index.tolist():
        (segment,) = (s for s in row.segments if position in s.own)
        before = [borrowed_ids[i] for i in segment.borrowed] + [own_ids[i] for i in segment.trunk]
        seen.append(before + own_ids[segment.own.start : position + 1])
        assert row.position_ids[0, position] == len(seen[-1]) - 1
    return seen


def test_common_prefix_is_decided_by_tokens() -> None:
    assert common_prefix_length([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2
    assert common_prefix_length([[1, 2, 3], [1, 2, 3]]) == 3
    assert common_prefix_length([[4], [5]]) == 0
    assert common_prefix_length([[4, 1], [4, 2], [4, 1, 3]]) == 1
    with pytest.raises(ValueError, match="sequences is empty"):
        common_prefix_length([])


def test_rows_of_a_live_teacher() -> None:
    pack = pack_groups([GROUP], share_student_prefix=True)
    assert pack.student.input_ids.tolist() == [[1, 2, 3, 9, 20, 21]]
    assert pack.student.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    # The prompt's last position predicts the first token of both rollouts.
    assert pack.student.prediction_index.tolist() == [3, 4, 5, 3]
    assert pack.teacher.borrowed_index.tolist() == [0, 1, 2]
    assert pack.teacher.input_ids.tolist() == [[5, 6, 9, 20, 21, 7, 7, 9]]
    assert pack.teacher.position_ids.tolist() == [[3, 4, 5, 6, 7, 4, 5, 6]]
    assert pack.teacher.prediction_index.tolist() == [2, 3, 4, 7]
    assert pack.targets.tolist() == [20, 21, 22, 30]
    assert pack.rollout_index.tolist() == [0, 0, 0, 1]
    assert pack.positions.tolist() == [0, 1, 2, 0]


def test_a_teacher_of_its_own_reads_the_prefix_once() -> None:
    teacher = pack_groups([GROUP], share_student_prefix=False).teacher
    assert len(teacher.borrowed_index) == 0
    assert teacher.input_ids.tolist() == [[1, 2, 3, 5, 6, 9, 20, 21, 7, 7, 9]]


def test_equal_teacher_prompts_are_read_once() -> None:
    group = PromptGroup([1, 2], [[1, 3, 4]] * 3, [[5, 6], [7], [8, 9]])
    pack = pack_groups([group], share_student_prefix=True)
    assert pack.teacher.input_ids.tolist() == [[3, 4, 5, 8]]
    assert pack.teacher.prediction_index.tolist() == [1, 2, 1, 1, 3]


def test_the_scored_position_is_never_borrowed() -> None:
    same = PromptGroup([1, 2, 3], [[1, 2, 3], [1, 2, 3]], [[4], [5]])
    pack = pack_groups([same], share_student_prefix=True)
    assert pack.teacher.borrowed_index.tolist() == [0, 1]
    assert pack.teacher.input_ids.tolist() == [[3]]


def test_a_single_rollout_is_one_segment() -> None:
    group = PromptGroup([1, 2], [[1, 3, 4]], [[5, 6]])
    pack = pack_groups([group], share_student_prefix=True)
    assert len(pack.student.segments) == len(pack.teacher.segments) == 1


@pytest.mark.parametrize("share", [True, False])
def test_every_prediction_sees_exactly_its_own_sequence(
    ragged_groups: list[PromptGroup], share: bool
) -> None:
    groups = [*ragged_groups, PromptGroup([3], [[4]], [[5, 6]]), GROUP]
    pack = pack_groups(groups, share_student_prefix=share)
    student, teacher, targets, rollouts = [], [], [], []
    for group in groups:
        for prompt, completion in zip(group.teacher_prompts, group.completions, strict=True):
            for i in range(len(completion)):
                student.append(group.student_prompt + completion[:i])
                teacher.append(prompt + completion[:i])
            targets += completion
            rollouts.append(len(completion))
    assert sequence_of_each_prediction(pack.student, pack.student) == student
    assert sequence_of_each_prediction(pack.teacher, pack.student) == teacher
    assert pack.targets.tolist() == targets
    assert torch.bincount(pack.rollout_index).tolist() == rollouts
    for row in (pack.student, pack.teacher):
        covered = sorted(i for segment in row.segments for i in segment.own)
        assert covered == list(range(row.input_ids.shape[1]))


def test_statistics_count_what_is_read() -> None:
    statistics = pack_groups([GROUP], share_student_prefix=True).statistics
    # Student rows of 6 and 4 tokens, teacher rows of 8 and 7.
    assert statistics == PackingStatistics(packed_tokens=6 + 8, unshared_tokens=10 + 15)


@pytest.mark.parametrize(
    ("prompt", "teacher_prompts", "completions", "message"),
    [
        ([], [[1]], [[1]], "student_prompt is empty"),
        ([1], [], [], "completions is empty"),
        ([1], [[1]], [[1], [2]], "teacher_prompts has 1 entries for 2 completions"),
        ([1], [[1], []], [[1], [2]], r"teacher_prompts\[1\] are empty"),
        ([1], [[1], [1]], [[], [2]], r"completions\[0\] are empty"),
    ],
)
def test_bad_groups_are_named(
    prompt: list[int], teacher_prompts: list[list[int]], completions: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PromptGroup(prompt, teacher_prompts, completions)


def test_an_empty_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="groups is empty"):
        pack_groups([], share_student_prefix=True)
