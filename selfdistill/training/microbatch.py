"""Which prompt groups go through the models together."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.model.layout import PromptGroup, pack_groups


def split_by_tokens(
    groups: Sequence[PromptGroup],
    *,
    max_tokens: int,
    share_student_prefix: bool,
    with_teacher: bool = True,
) -> list[list[PromptGroup]]:
    """Put prompt groups into as few passes as first-fit decreasing finds.

    Args:
        groups: any number of prompt groups, in any order.
        max_tokens: most tokens of both packed rows together. A group with more of them, which
            cannot be split without reading its prompt twice, has a pass of its own.
        share_student_prefix, with_teacher: as for `pack_groups`.

    Returns:
        Passes of one group at least, the largest group first; every group is in one of them.
    """

    def packed_tokens(group: PromptGroup) -> int:
        pack = pack_groups(
            [group], share_student_prefix=share_student_prefix, with_teacher=with_teacher
        )
        return pack.statistics.packed_tokens

    sized = sorted(
        ((packed_tokens(group), group) for group in groups), key=lambda pair: pair[0], reverse=True
    )
    passes: list[list[PromptGroup]] = []
    room: list[int] = []
    for size, group in sized:
        for i, left in enumerate(room):
            if size <= left:
                passes[i].append(group)
                room[i] -= size
                break
        else:
            passes.append([group])
            room.append(max_tokens - size)
    return passes
