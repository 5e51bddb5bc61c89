"""What the student wrote at each step, and what the teacher thought of every token of it.

    completions/step-000042.jsonl      a line for each rollout

Loaded unless the configuration says `completions: null`. The oldest files go when the folder gets
too large.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfdistill.config import CompletionsConfig
from selfdistill.methods.method import Contexts
from selfdistill.model.layout import PromptGroup
from selfdistill.model.scoring import ScoredTokens
from selfdistill.rollout.attempts import Attempts
from selfdistill.rollout.engine import completion_text
from selfdistill.runlog import write_atomically
from selfdistill.training.batch import Batch
from selfdistill_kernels import DistillationOutput

FOLDER = "completions"
_FILE = re.compile(r"step-(\d{6,})\.jsonl")


class CompletionLog:
    """The completions folder of one run.

    Args:
        run: the run's folder.
        settings: how often, and how much is kept.
        tokenizer: says what the tokens are.
    """

    def __init__(
        self, run: Path, settings: CompletionsConfig, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._folder = run / FOLDER
        self._settings = settings
        self._tokenizer = tokenizer
        self._advantages: dict[int, list[list[float]]] = {}
        # Most pairs of tokens come again, and decoding is most of what a record takes.
        self._piece = lru_cache(maxsize=1 << 16)(self._decode)

    def keeps(self, step: int) -> bool:
        """Return whether the step is one whose rollouts are kept."""
        return step % self._settings.every == 0

    def observe(
        self, groups: Sequence[PromptGroup], scored: ScoredTokens, output: DistillationOutput
    ) -> None:
        """Note what a pass said about its tokens; of several updates the last one counts."""
        assert output.advantage is not None
        lengths = scored.rollout_index.bincount().tolist()
        parts = iter(output.advantage.detach().float().cpu().split(lengths))
        for group in groups:
            self._advantages[id(group)] = [next(parts).tolist() for _ in group.completions]

    def records(
        self, attempts: Sequence[Attempts], contexts: Contexts, batch: Batch
    ) -> list[dict[str, Any]]:
        """Return a record for each of this rank's rollouts, and forget what was observed.

        Args:
            attempts: all of them.
            contexts: what the teacher saw with each.
            batch: what was learned from; its groups are those that were observed.
        """
        advantages = {
            id(rollout): self._advantages[id(group)][i]
            for attempt, group in zip(batch.attempts, batch.groups, strict=True)
            for i, rollout in enumerate(attempt.rollouts)
            if id(group) in self._advantages
        }
        self._advantages = {}
        found = []
        for attempt, shown in zip(attempts, contexts, strict=True):
            for i, (rollout, verdict, context) in enumerate(
                zip(attempt.rollouts, attempt.verdicts, shown, strict=True)
            ):
                own = advantages.get(id(rollout))
                found.append(
                    {
                        "problem": attempt.problem.id,
                        "question": attempt.problem.question,
                        "rollout": i,
                        "text": rollout.text,
                        "answer": verdict.answer,
                        "reward": verdict.reward,
                        "correct": verdict.correct,
                        "finished": rollout.finished,
                        "context": None
                        if context is None
                        else {"kind": context.kind, "text": context.text},
                        "tokens": self._pieces(rollout.token_ids),
                        "logprobs": [round(logprob, 5) for logprob in rollout.logprobs],
                        # In nats; none where the rollout was left out or taught nothing.
                        "advantages": None if own is None else [round(a, 5) for a in own],
                    }
                )
        return found

    def _pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token, as it stands behind the one before it."""
        return [self._piece(*pair) for pair in pairwise([None, *token_ids])]

    def _decode(self, before: int | None, token: int) -> str:
        lead = [] if before is None else [before]
        start = len(completion_text(self._tokenizer, lead))
        return completion_text(self._tokenizer, [*lead, token])[start:]

    def write(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Write a step's file, and remove the oldest ones beyond the limit."""
        text = "".join(json.dumps({"step": step, **record}) + "\n" for record in records)
        write_atomically(self._folder / f"step-{step:06d}.jsonl", text)
        room = self._settings.max_mib * 2**20
        for _, path in sorted(saved(self._folder).items(), reverse=True):
            room -= path.stat().st_size
            if room < 0 and path.name != f"step-{step:06d}.jsonl":
                path.unlink()

    def keep_until(self, step: int) -> None:
        """Forget what lies after `step`: a resumed run will write it again."""
        for later, path in saved(self._folder).items():
            if later > step:
                path.unlink()


def saved(folder: Path) -> dict[int, Path]:
    """Return the files of a completions folder by their steps."""
    if not folder.is_dir():
        return {}
    found = ((_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}
