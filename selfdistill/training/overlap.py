"""Rollouts of the next step, drawn by servers while this one trains (`max_staleness: 1`).

    step n          servers                        this process
    begins          W(n-1) is what they have       W(n-1) is what it has
    goes on         draw for step n + 1            trains on what was drawn for step n: W(n)
    ends            have drawn; take over W(n)     evaluates and writes a checkpoint

So every step but the first learns from rollouts of the weights before, and the loss weighs them.
What was drawn goes into the checkpoint: a run that goes on learns from the same rollouts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from selfdistill.rollout.engine import Rollout, RolloutEngine, naming_failures
from selfdistill.rollout.vllm_server_engine import Drawing, VLLMServerEngine
from selfdistill.tasks.interface import TaskError
from selfdistill.training.distributed import Ranks
from selfdistill.training.questions import Questions

_FILE = "rollouts.json"
# Tokens of the rollouts that are drawn to compare log-probs only.
_PROBE = 8


class Ahead:
    """Holds the rollouts of the next step.

    Args:
        engine: draws them.
        ask: tells what a step asks; all ranks call it together.
        ranks: the processes that share a step.
        steps: of the whole run.

    Attributes:
        fresh: prompts and rollouts of the weights that the servers have in the step at hand, to
            compare log-probs with; none where the comparison is not due.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        ask: Callable[[int], Questions],
        *,
        ranks: Ranks,
        steps: int,
    ) -> None:
        assert isinstance(engine, VLLMServerEngine)  # the only one that has the setting
        self._engine = engine
        self._ask = ask
        self._ranks = ranks
        self._steps = steps
        self._next: Questions | None = None
        self._drawing: Drawing | None = None
        self._drawn: list[list[Rollout]] | None = None
        self.fresh: tuple[list[list[int]], list[list[Rollout]]] = [], []

    def take(self, questions: Questions) -> list[list[Rollout]]:
        """Return the rollouts of a step, and begin to draw those of the next one.

        Raises:
            EngineError: see `selfdistill.rollout.engine.sample`.
        """
        groups, self._drawn = self._drawn, None
        if groups is None:
            groups = questions.sample(self._engine)
            self.fresh = questions.prompts, groups
        else:
            # While the servers are idle: beside other rollouts a short one takes as long as they.
            self.fresh = self._probe(questions)
        if questions.step < self._steps:
            # Where none of its problems fits, that is said when its turn has come.
            with suppress(TaskError):
                self._next = self._ask(questions.step + 1)
            if self._next is not None and self._next.prompts:
                with naming_failures(self._engine, self._next.names):
                    self._drawing = self._engine.begin(
                        self._next.prompts,
                        group_size=self._next.group_size,
                        params=self._next.params,
                    )
        return groups

    def _probe(self, questions: Questions) -> tuple[list[list[int]], list[list[Rollout]]]:
        settings = self._engine.settings
        if questions.step % settings.check_every:
            return [], []
        # The first prompts go to one server each.
        probe = replace(
            questions,
            prompts=questions.prompts[: len(settings.base_urls)],
            group_size=1,
            params=replace(
                questions.params, max_new_tokens=min(_PROBE, questions.params.max_new_tokens)
            ),
        )
        return probe.prompts, probe.sample(self._engine)

    def settle(self) -> None:
        """Wait for what is being drawn, on all ranks, before the weights are synced.

        Raises:
            EngineError: see `selfdistill.rollout.engine.sample`.
        """
        if self._next is None:
            return
        self._drawn = []
        if self._drawing is not None:
            with naming_failures(self._engine, self._next.names):
                self._drawn = self._drawing.finish()
        self._next, self._drawing = None, None
        # The first rank to sync has the servers forget the adapter that others still draw from.
        self._ranks.any(False)

    def files(self) -> dict[str, str]:
        """Return what a checkpoint has to keep; all ranks call it together."""
        if self._drawn is None:
            return {}
        groups = self._ranks.gather(self._drawn)
        return {_FILE: json.dumps([[asdict(rollout) for rollout in group] for group in groups])}

    def restore(self, checkpoint: Path) -> None:
        """Take over what was drawn before a checkpoint, by any number of ranks."""
        path = checkpoint / _FILE
        if not path.exists():  # of the start, before anything was drawn
            return
        groups = json.loads(path.read_bytes())
        share = self._ranks.share(len(groups))
        self._drawn = [
            [Rollout(**rollout) for rollout in group] for group in groups[share.start : share.stop]
        ]
