"""Rollouts of ragged length: the trainer's engine beside `model.generate`, in tokens a second.

    python -m benchmarks.bench_rollout --output runs/benchmarks
    python -m benchmarks.bench_rollout --model examples/smollm2_135m/model --prompts 4 --group 4

    engine      `TransformersEngine`
    generate    transformers' `model.generate`, every rollout a row until the last one has ended

Without a model, SmolLM2-135M with 4 of its 30 layers and random weights, whose rollouts end after
half of the tokens in the mean. Greedy tokens of both are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import arguments
from benchmarks.environment import environment
from benchmarks.report import Table, markdown_table, print_table
from benchmarks.step import ModelSize
from benchmarks.timing import clock_for, interleave
from selfdistill.model.folder import load_causal_lm, load_tokenizer
from selfdistill.rollout.engine import SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer

Sample = Callable[[float], list[list[int]]]


@dataclass(frozen=True)
class RolloutProblem:
    """What is sampled.

    Attributes:
        model: in evaluation mode; its generation config says which tokens end a rollout.
        tokenizer: decodes what the engine returns.
        prompts: token ids.
        group_size: rollouts of each prompt.
        new_tokens: most tokens of a rollout.
        rows: rows that the engine samples at once.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    group_size: int
    new_tokens: int
    rows: int

    @property
    def engine(self) -> TransformersEngine:
        return TransformersEngine(self.model, self.tokenizer, batch_size=self.rows)


def random_model(size: ModelSize, *, new_tokens: int) -> PreTrainedModel:
    """A model whose rollouts end after half of `new_tokens` in the mean."""
    model = size.build().eval()
    model.generation_config.eos_token_id = list(range(max(1, 2 * size.vocabulary // new_tokens)))
    return model


def random_prompts(count: int, *, vocabulary: int) -> list[list[int]]:
    """Prompts of 32 to 64 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(32, 65, (count,), generator=generator).tolist()
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def contenders(problem: RolloutProblem) -> dict[str, Sample]:
    """Functions of the temperature that return the tokens of all rollouts."""
    return {
        "engine": partial(_engine, problem),
        "generate": partial(_generate, problem),
    }


def _engine(problem: RolloutProblem, temperature: float) -> list[list[int]]:
    params = SamplingParams(temperature=temperature, max_new_tokens=problem.new_tokens, seed=1)
    groups = problem.engine.generate(problem.prompts, group_size=problem.group_size, params=params)
    return [rollout.token_ids for group in groups for rollout in group]


@torch.no_grad()
def _generate(problem: RolloutProblem, temperature: float) -> list[list[int]]:
    torch.manual_seed(1)
    ends = problem.engine.eos_token_ids
    width = max(map(len, problem.prompts))
    padding = [width - len(prompt) for prompt in problem.prompts]
    ids = [[0] * pad + ids for pad, ids in zip(padding, problem.prompts, strict=True)]
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    rows = problem.model.generate(
        input_ids=torch.tensor(ids).repeat_interleave(problem.group_size, 0),
        attention_mask=torch.tensor(
            [[0] * pad + [1] * (width - pad) for pad in padding]
        ).repeat_interleave(problem.group_size, 0),
        max_new_tokens=problem.new_tokens,
        do_sample=temperature > 0,
        eos_token_id=list(ends),
        pad_token_id=0,
        **sampling,
    )

    def cut(tokens: list[int]) -> list[int]:
        stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        return tokens[:stop]

    return [cut(row[width:]) for row in rows.tolist()]


def check(problem: RolloutProblem) -> None:
    """Make sure that greedy tokens after the first prompts are the same.

    Raises:
        RuntimeError: they are not, so the times would be of different rollouts.
    """
    few = replace(problem, prompts=problem.prompts[:4], group_size=1)
    greedy = {name: sample(0.0) for name, sample in contenders(few).items()}
    for name, rows in greedy.items():
        same = sum(row == own for row, own in zip(rows, greedy["generate"], strict=True))
        # Two tokens that are nearly equally likely may be rounded either way.
        if same < 0.7 * len(rows):
            raise RuntimeError(f"{name}: {same} of {len(rows)} greedy rollouts are generate's")


def measure(problem: RolloutProblem, *, rounds: int) -> Table:
    """Time the contenders in turn at temperature 1; each draws the same tokens in every round."""
    samples = contenders(problem)
    lengths: dict[str, list[int]] = {}

    def timed(name: str) -> None:
        lengths[name] = [len(row) for row in samples[name](1.0)]

    timings = interleave(
        {name: partial(timed, name) for name in samples}, rounds, clock=clock_for("cpu")
    )
    rates = {name: sum(lengths[name]) / timings[name].median for name in samples}
    body = [
        (
            name,
            f"{timings[name].median:.2f} (±{timings[name].spread:.0%})",
            str(sum(lengths[name])),
            f"{min(lengths[name])}-{max(lengths[name])}",
            f"{rates[name]:.1f}",
            f"{rates[name] / rates['generate']:.2f}",
        )
        for name in samples
    ]
    head = ("Contender", "s", "Tokens", "Lengths", "Tokens/s", "Over generate")
    return Table(f"{len(problem.prompts)} x {problem.group_size} rollouts", head, body)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    size = ModelSize(layers=args.layers)
    if args.model is None:
        model = random_model(size, new_tokens=args.new_tokens)
        tokenizer: PreTrainedTokenizerBase = build_tokenizer()
    else:
        model = load_causal_lm(args.model, dtype=torch.float32, setting="--model").eval()
        tokenizer = load_tokenizer(args.model)
    problem = RolloutProblem(
        model=model,
        tokenizer=tokenizer,
        prompts=random_prompts(args.prompts, vocabulary=model.config.vocab_size),
        group_size=args.group,
        new_tokens=args.new_tokens,
        rows=args.rows or args.prompts * args.group,
    )
    console = Console()
    check(problem)
    table = measure(problem, rounds=args.rounds)
    facts = environment("cpu") | {"arguments": {k: str(v) for k, v in vars(args).items()}}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "rollout.md").write_text("\n".join(markdown_table(table)) + "\n")
    (args.output / "rollout.json").write_text(
        json.dumps(facts | {"rows": list(table.body)}, indent=2)
    )
    print_table(console, table)
    console.print(f"wrote rollout.md and rollout.json to {args.output}", highlight=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_rollout",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--model", metavar="DIR", help="a model's folder; by default one with random weights")
    add("--layers", type=arguments.positive, default=ModelSize().layers, help="of the random model")
    add("--prompts", type=arguments.positive, default=16)
    add("--group", type=arguments.positive, default=4, help="rollouts of each prompt")
    add("--new-tokens", type=arguments.positive, default=64, help="most of a rollout")
    add("--rows", type=arguments.positive, help="at once in the engine; by default all")
    add("--rounds", type=arguments.positive, default=5, help="timed rounds, after a discarded one")
    add("--threads", type=arguments.positive, default=torch.get_num_threads())
    add("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    # fmt: on
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
