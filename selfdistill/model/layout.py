"""Longest common token prefix, and packing of prompt groups into one row for each role.

A prompt group is one problem x with G rollouts y_i and one teacher prompt t_i for each. Student and
teacher both score every y_i, so most of what they read is the same. Each role reads ONE packed
row of batch size 1, cut into segments that form a prefix tree:

    student  [ x | y_1[:-1] | ... | y_G[:-1] ]            one group after another
    teacher  [ t[n:m] | t_1[m:] + y_1[:-1] | ... ]        m: what the t_i share, n: what is borrowed

The first n tokens of x and of all t_i are equal: a teacher with the student's own weights borrows
their keys and values from the student's pass (n > 0); any other teacher reads them itself (n = 0),
still only once for the G rows. Tokens, never text, decide what is shared, and every mask follows
from lengths, never from comparing with a padding token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PromptGroup:
    """One problem with its rollouts, as token ids.

    Attributes:
        student_prompt: what the student was given (x).
        teacher_prompts: what the teacher is given, one for each rollout (t_i).
        completions: the student's own rollouts (y_i), with their end-of-sequence token, if any.
        rewards: of each rollout; None where nobody judged them.
        old_logprobs: the log-prob (nats) of each completion token under the policy that sampled
            it, at the sampling temperature; None where they are not known.
        steps: the step of its rollout that each completion token belongs to, counted from 0, -1
            outside of steps; None where nobody asked.
        wrong: whether each completion token belongs to its rollout's first wrong step; None where
            nobody asked.
        contrast_prompts: what the teacher is given when its judgement is to be subtracted, one for
            each rollout; None where nothing is subtracted.

    Raises:
        ValueError: a list is empty, or does not have one entry for each completion (or token).
    """

    student_prompt: list[int]
    teacher_prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float] | None = None
    old_logprobs: list[list[float]] | None = None
    steps: list[list[int]] | None = None
    wrong: list[list[bool]] | None = None
    contrast_prompts: list[list[int]] | None = None

    def __post_init__(self) -> None:
        if not self.student_prompt:
            raise ValueError(
                "student_prompt is empty: at least one token must precede a completion"
            )
        if not self.completions:
            raise ValueError("completions is empty: a prompt group needs at least one rollout")
        per_token = ("old_logprobs", "steps", "wrong")
        for name in ("teacher_prompts", "contrast_prompts", "rewards", *per_token):
            entries = getattr(self, name)
            if entries is not None and len(entries) != len(self.completions):
                raise ValueError(
                    f"{name} has {len(entries)} entries for {len(self.completions)} completions: "
                    "give one per rollout"
                )
        for name in per_token:
            for i, row in enumerate(getattr(self, name) or []):
                if len(row) != len(self.completions[i]):
                    raise ValueError(
                        f"{name}[{i}] has {len(row)} entries for a completion of "
                        f"{len(self.completions[i])} tokens: give one per token"
                    )
        for name in ("teacher_prompts", "contrast_prompts", "completions"):
            empty = [i for i, tokens in enumerate(getattr(self, name) or []) if not tokens]
            if empty:
                raise ValueError(f"{name}{empty} are empty: leave those rollouts out of the group")

    @property
    def all_teacher_prompts(self) -> list[list[int]]:
        """What the teacher reads each rollout after: once each, and then once each to subtract."""
        return [*self.teacher_prompts, *(self.contrast_prompts or [])]

    @property
    def num_tokens(self) -> int:
        """Completion tokens of all rollouts."""
        return sum(map(len, self.completions))


@dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens of a packed row, and the keys that it attends before its own.

    Attributes:
        borrowed: places in `PackedRow.borrowed_index`, the start of the sequence; may be empty.
        trunk: row positions of what the group's sequences share next; may be empty.
        own: row positions of the segment itself, never empty.
        group: number of the prompt group within the row.
        branch: number of the branch within the group; None for the trunk itself.

    Together the three cover the positions 0, 1, 2, ... of one sequence without a gap, so the k-th
    key has position k and the segment's queries are the last ones: its mask is lower-right causal.
    """

    borrowed: range
    trunk: range
    own: range
    group: int
    branch: int | None

    @property
    def num_keys(self) -> int:
        """Number of keys that the segment's last token attends."""
        return len(self.borrowed) + len(self.trunk) + len(self.own)

    def key_index(self, num_borrowed: int) -> torch.Tensor:
        """[num_keys] int64, the segment's keys among the row's borrowed ones and then its own.

        Args:
            num_borrowed: keys that the whole row borrows.
        """
        return torch.cat(
            [
                torch.arange(self.borrowed.start, self.borrowed.stop),
                torch.arange(self.trunk.start, self.trunk.stop) + num_borrowed,
                torch.arange(self.own.start, self.own.stop) + num_borrowed,
            ]
        )


@dataclass(frozen=True)
class PackedRow:
    """Everything one role reads in one forward pass.

    Attributes:
        input_ids: [1, L] int64.
        position_ids: [1, L] int64, the position of each token in its own unpacked sequence.
        segments: the prefix tree, in the order of the row; every token lies in exactly one segment.
        prediction_index: [T] int64, the row position whose hidden state predicts each completion
            token. A shared last prompt position appears once for every rollout that starts there.
        borrowed_index: [B] int64, positions in the *student's* row whose keys and values come first
            for this row's queries; empty when nothing is borrowed.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[Segment, ...]
    prediction_index: torch.Tensor
    borrowed_index: torch.Tensor


@dataclass(frozen=True)
class PackingStatistics:
    """Tokens that go through the model, both roles together.

    Attributes:
        packed_tokens: in the two packed rows.
        unshared_tokens: every rollout a row of its own, no padding.

    A row's last token predicts nothing and is counted nowhere. The saving depends on the lengths:
    large for long prompts with short responses, small for long responses.
    """

    packed_tokens: int
    unshared_tokens: int


@dataclass(frozen=True)
class Pack:
    """One or several prompt groups, ready for one student pass and one teacher pass.

    Attributes:
        student: the student's row.
        teacher: the teacher's row; None when no teacher reads. It predicts a group's completions a
            second time where the group has prompts whose judgement is subtracted.
        targets: [T] int64, the completion tokens, rollout after rollout.
        rollout_index: [T] int64, the rollout of each token, counted through all groups.
        positions: [T] int64, the token's place within its completion.
        statistics: tokens read here and by the usual ways.
    """

    student: PackedRow
    teacher: PackedRow | None
    targets: torch.Tensor
    rollout_index: torch.Tensor
    positions: torch.Tensor
    statistics: PackingStatistics


def common_prefix_length(sequences: Sequence[list[int]]) -> int:
    """Return the number of leading tokens that all sequences have in common.

    Raises:
        ValueError: no sequence was given.
    """
    if not sequences:
        raise ValueError("sequences is empty: a common prefix needs at least one sequence")
    # The lexicographic extremes differ first where any two sequences differ.
    low, high = min(sequences), max(sequences)
    for length, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return length
    return min(len(low), len(high))


def pack_groups(
    groups: Sequence[PromptGroup], *, share_student_prefix: bool, with_teacher: bool = True
) -> Pack:
    """Pack prompt groups into one row for the student and one for the teacher.

    Args:
        groups: one or several prompt groups.
        share_student_prefix: the teacher borrows the keys and values of the longest common prefix
            from the student's pass. Exact only when both have the same weights.
        with_teacher: False packs the student's row alone.

    Raises:
        ValueError: `groups` is empty.
    """
    if not groups:
        raise ValueError("groups is empty: nothing to pack")
    student, teacher = _RowBuilder(), _RowBuilder()
    for group in groups:
        group_start = len(student.input_ids)
        student.add_group([group.student_prompt] * len(group.completions), group.completions)
        if not with_teacher:
            continue
        borrowed = 0
        if share_student_prefix:
            # The position that predicts y_i[0] is scored in the teacher's own row.
            borrowed = min(
                common_prefix_length([group.student_prompt, *group.all_teacher_prompts]),
                min(map(len, group.all_teacher_prompts)) - 1,
            )
        teacher.add_group(
            group.all_teacher_prompts,
            group.completions * (1 if group.contrast_prompts is None else 2),
            borrow=range(group_start, group_start + borrowed),
        )

    completions = [completion for group in groups for completion in group.completions]
    lengths = torch.tensor([len(completion) for completion in completions])
    return Pack(
        student=student.build(),
        teacher=teacher.build() if with_teacher else None,
        targets=torch.tensor([token for completion in completions for token in completion]),
        rollout_index=torch.repeat_interleave(torch.arange(len(completions)), lengths),
        positions=torch.cat([torch.arange(len(completion)) for completion in completions]),
        statistics=_statistics(
            groups, len(student.input_ids) + len(teacher.input_ids), with_teacher=with_teacher
        ),
    )


class _RowBuilder:
    """Appends prompt groups to one packed row."""

    def __init__(self) -> None:
        self.input_ids: list[int] = []
        self._position_ids: list[int] = []
        self._prediction_index: list[int] = []
        self._borrowed_index: list[int] = []
        self._segments: list[Segment] = []
        self._num_groups = 0

    def add_group(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        *,
        borrow: range = range(0),
    ) -> None:
        """Append what all `prompts` share (less what they borrow), then one branch for each."""
        # A single rollout shares nothing: prompt and completion stay one segment.
        shared = common_prefix_length(prompts) if len(prompts) > 1 else len(borrow)
        borrowed = range(len(self._borrowed_index), len(self._borrowed_index) + len(borrow))
        self._borrowed_index.extend(borrow)
        trunk = self._append(prompts[0][len(borrow) : shared], first_position=len(borrow))
        if trunk:
            self._segments.append(Segment(borrowed, range(0), trunk, self._num_groups, None))
        for branch, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            own = self._append(prompt[shared:] + completion[:-1], first_position=shared)
            if own:
                self._segments.append(Segment(borrowed, trunk, own, self._num_groups, branch))
            # The token at position p of this sequence predicts the one at p + 1.
            for p in range(len(prompt) - 1, len(prompt) + len(completion) - 1):
                row = trunk[p - len(borrow)] if p < shared else own[p - shared]
                self._prediction_index.append(row)
        self._num_groups += 1

    def _append(self, tokens: list[int], *, first_position: int) -> range:
        start = len(self.input_ids)
        self.input_ids.extend(tokens)
        self._position_ids.extend(range(first_position, first_position + len(tokens)))
        return range(start, start + len(tokens))

    def build(self) -> PackedRow:
        """Return the row as tensors."""
        return PackedRow(
            input_ids=torch.tensor([self.input_ids]),
            position_ids=torch.tensor([self._position_ids]),
            segments=tuple(self._segments),
            prediction_index=torch.tensor(self._prediction_index),
            borrowed_index=torch.tensor(self._borrowed_index, dtype=torch.int64),
        )


def _statistics(
    groups: Sequence[PromptGroup], packed_tokens: int, *, with_teacher: bool
) -> PackingStatistics:
    unshared = 0
    for group in groups:
        for completion in group.completions:
            unshared += len(group.student_prompt) + len(completion) - 1
        for i, prompt in enumerate(group.all_teacher_prompts if with_teacher else []):
            unshared += len(prompt) + len(group.completions[i % len(group.completions)]) - 1
    return PackingStatistics(packed_tokens=packed_tokens, unshared_tokens=unshared)
