"""How a problem is cut into tiles that fit a workspace."""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 1 << 20
# A tile of 256 student and 256 teacher rows is where the head is read seldom enough for the GEMMs
# to run at full speed; the cap keeps large vocabularies from taking it all (docs/decisions.md).
AUTO_ROWS = 256
AUTO_CAP = 256 * MEBIBYTE


@dataclass(frozen=True)
class TilePlan:
    """A tile spans the vocabulary: `buffer_rows` rows of float32 logits, shared by the student's
    and the teacher's rows and by gradient rows that wait for their GEMM.

    Attributes:
        buffer_rows: rows of the workspace, 2 or more.
        vocabulary: columns of the workspace.
        heads: 2 with a teacher, 1 without.
    """

    buffer_rows: int
    vocabulary: int
    heads: int

    @classmethod
    def store(cls, *, tokens: int, vocabulary: int, heads: int, workspace: int) -> TilePlan:
        """Cut `tokens` into tiles within `workspace` bytes (0: choose).

        Raises:
            ValueError: the workspace cannot hold one token's logits.
        """
        row_bytes = 4 * vocabulary
        budget = workspace or max(min(heads * AUTO_ROWS * row_bytes, AUTO_CAP), heads * row_bytes)
        rows = budget // row_bytes
        if rows < heads:
            raise ValueError(
                f"workspace: {budget} bytes cannot hold one tile; this problem needs at least "
                f"{heads * row_bytes} bytes ({heads} float32 rows of {vocabulary} logits)"
            )
        return cls(min(rows, heads * max(tokens, 1)), vocabulary, heads)

    @property
    def bytes(self) -> int:
        """Size of the workspace."""
        return 4 * self.buffer_rows * self.vocabulary

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"store: {self.buffer_rows // self.heads} tokens x {self.heads} heads x "
            f"{self.vocabulary} logits a tile, {self.bytes / MEBIBYTE:.1f} MiB"
        )
