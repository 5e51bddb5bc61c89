"""How much the demo's training raised accuracy, problem by problem."""

from __future__ import annotations

from selfdistill.evaluation.intervals import Interval, bootstrap
from selfdistill.evaluation.scores import Evaluation


def avg_difference(before: Evaluation, after: Evaluation) -> Interval:
    """How much Avg@k rose, paired by problem: an interval above 0 is a rise beyond chance.

    Raises:
        ValueError: the two evaluations are not of the same problems in the same order.
    """
    ids_before = [p.problem_id for p in before.problems]
    ids_after = [p.problem_id for p in after.problems]
    if ids_before != ids_after:
        raise ValueError(
            "before and after must be evaluations of the same problems in the same order, got "
            f"{len(ids_before)} and {len(ids_after)} problems that differ"
        )
    return bootstrap(
        [
            new.correct / after.samples - old.correct / before.samples
            for old, new in zip(before.problems, after.problems, strict=True)
        ],
        bounds=(-1.0, 1.0),
    )
