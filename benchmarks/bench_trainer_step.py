"""One step of the trainer on a LoRA student: rollout, scoring, loss, backward, update, in seconds.

    python -m benchmarks.bench_trainer_step --output runs/benchmarks
    python -m benchmarks.bench_trainer_step --layers 8 --rounds 5 --threads 2

The shape of examples/smollm2_135m.yaml with 4 prompts and 4 rollouts of 64 new tokens, none of
which ends before: SmolLM2-135M with random weights (30 layers, vocabulary of 49152), LoRA of rank
16 on all linear layers, the base model as teacher, which sees 32 tokens more in the mean. It shows
which phase a change of the trainer has to be about; docs/benchmarks.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from benchmarks import arguments
from benchmarks.environment import environment
from benchmarks.report import Table, markdown_table, print_table
from benchmarks.step import TAIL, ModelSize
from selfdistill.config import AdapterConfig, LossConfig
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.model.adapters import attach_adapter
from selfdistill.model.attention import enable_prefix_sharing
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.scoring import score
from selfdistill.model.teacher import BaseTeacher
from selfdistill.rollout.engine import SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.training.gradients import clip_gradients

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class TrainerStep:
    """A student and what one step asks of it.

    Attributes:
        size: of the model.
        prompts: of the step; group: rollouts of each; new_tokens: of each.
        seconds: of the phases of the step that ran last.
        tokens: that were sampled last.
    """

    size: ModelSize
    prompts: int = 4
    group: int = 4
    new_tokens: int = 64
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: list[list[list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        adapter = AdapterConfig(r=16, alpha=32, target_modules=MODULES)
        self.student = attach_adapter(self.size.build(), adapter, seed=0).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # as after some steps: before the first one B is zero
            for name, parameter in self.student.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 100)
        enable_prefix_sharing(self.student)
        self.teacher = BaseTeacher()
        self.heads = find_lm_heads(self.student, self.teacher)
        self.loss = DistillationLoss(LossConfig())
        self.learning = [p for p in self.student.parameters() if p.requires_grad]
        # A rate of zero: every round takes the same step.
        self.optimizer = torch.optim.AdamW(self.learning, lr=0.0)
        self.engine = TransformersEngine(self.student, build_tokenizer(), batch_size=16)
        self.engine.eos_token_ids = ()

    def _draw(self, generator: torch.Generator, low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(3, self.size.vocabulary, (length,), generator=generator).tolist()

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start

    def run(self) -> None:
        """Take the step."""
        generator = torch.Generator().manual_seed(2)
        questions = [self._draw(generator, 32, 64) for _ in range(self.prompts)]
        params = SamplingParams(temperature=1.0, max_new_tokens=self.new_tokens, seed=3)
        with self._clock("rollout"):
            sampled = self.engine.generate(questions, group_size=self.group, params=params)
        self.tokens = [[rollout.token_ids for rollout in group] for group in sampled]
        groups = []
        for question, completions in zip(questions, self.tokens, strict=True):
            contexts = [self._draw(generator, 16, 48) for _ in completions]
            seen = [[*question[:-TAIL], *c, *question[-TAIL:]] for c in contexts]
            groups.append(PromptGroup(question, seen, completions))
        self.optimizer.zero_grad()
        with self._clock("student and teacher"):
            scored = score(self.student, self.teacher, groups)
        with self._clock("loss"):
            output = self.loss(scored, *self.heads, normalizer=len(scored.targets))
        with self._clock("backward"):
            output.loss.backward()
        with self._clock("update"):
            clip_gradients(self.learning, max_norm=1.0)
            self.optimizer.step()


def measure(step: TrainerStep, *, rounds: int) -> Table:
    """Time the step phase by phase: medians over rounds, after one that warms up."""
    step.run()
    taken = []
    for _ in range(rounds):
        step.run()
        taken.append(dict(step.seconds))
    total = median(sum(one.values()) for one in taken)
    seconds = {phase: median(one[phase] for one in taken) for phase in taken[0]} | {"step": total}
    body = [(phase, f"{s:.2f}", f"{100 * s / total:.0f} %") for phase, s in seconds.items()]
    return Table("One step of the trainer", ("Phase", "Seconds", "Share"), body)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    step = TrainerStep(
        ModelSize(layers=args.layers, vocabulary=args.vocabulary), new_tokens=args.new_tokens
    )
    console = Console()
    table = measure(step, rounds=args.rounds)
    facts = environment("cpu") | {"arguments": {k: str(v) for k, v in vars(args).items()}}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "trainer_step.md").write_text("\n".join(markdown_table(table)) + "\n")
    (args.output / "trainer_step.json").write_text(
        json.dumps(facts | {"rows": list(table.body)}, indent=2)
    )
    print_table(console, table)
    console.print(f"wrote trainer_step.md and trainer_step.json to {args.output}", highlight=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_trainer_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--layers", type=arguments.positive, default=30)
    add("--vocabulary", type=arguments.positive, default=49152)
    add("--new-tokens", type=arguments.positive, default=64)
    add("--rounds", type=arguments.positive, default=3)
    add("--threads", type=arguments.positive, default=torch.get_num_threads())
    add("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
