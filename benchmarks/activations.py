"""Hidden states of a real model, for the benchmarks whose cost depends on what is in them.

    python -m benchmarks.activations MODEL OUTPUT [--tokens 512] [--new-tokens 64]

MODEL is a transformers folder (examples/smollm2_135m/prepare.py makes one), OUTPUT a file for
`--activations` of benchmarks/tolerance.py. The model answers small questions at temperature 1; the
student has seen the question, the teacher a worked solution as well, as in the paper
(arXiv 2606.11173). A random choice of the sampled tokens is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.problems import Problem

# A question, and its solution for the teacher, of two numbers.
QUESTIONS = (
    ("A box holds {a} pens. How many pens are in {b} boxes?", "{a} * {b} = {ab} pens."),
    ("Ann has {ab} apples and shares them among {b} friends. How many does each get?",
     "{ab} / {b} = {a}, so each friend gets {a} apples."),
    ("A train goes {a} km an hour. How far does it go in {b} hours, and why?",
     "Distance is speed times time: {a} * {b} = {ab} km."),
    ("Explain in two sentences how to add {a} and {b} on paper.",
     "Write {a} above {b}, add the ones first, carry, then add the tens."),
    ("Write a short story about {b} foxes and {a} stones.",
     "The {b} foxes carried {a} stones to the river and built a bridge."),
    ("Write a Python function that returns the sum of {a} and its argument.",
     "def add(x):\n    return x + {a}"),
    ("What is the capital of France, and which number is larger, {a} or {b}?",
     "The capital is Paris. Of {a} and {b}, the larger is the greater of the two."),
    ("Tom reads {b} pages a day. How many days does he need for {ab} pages?",
     "{ab} / {b} = {a} days."),
)  # fmt: skip
ROUNDS = 3


def prompts() -> list[tuple[str, str]]:
    """What the student sees, and what the teacher sees."""
    made = []
    for turn in range(ROUNDS):
        for place, (question, solution) in enumerate(QUESTIONS):
            numbers = {"a": 12 + 5 * place + 7 * turn, "b": 3 + turn + place % 4}
            numbers["ab"] = numbers["a"] * numbers["b"]
            asked, solved = question.format(**numbers), solution.format(**numbers)
            made.append((asked, f"{asked}\n\nA correct solution is:\n{solved}\n\nAnswer it."))
    return made


@torch.no_grad()
def sampled(model: Path, tokens: int, new_tokens: int, seed: int) -> dict[str, Tensor]:
    """student_hidden and teacher_hidden [tokens, H], weight [V, H], targets [tokens].

    Raises:
        ValueError: the model has sampled fewer tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    students: list[Tensor] = []
    teachers: list[Tensor] = []
    targets: list[Tensor] = []
    for asked, shown in prompts():
        seen = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True, return_tensors="pt", return_dict=True,
            )["input_ids"]
            for text in (asked, shown)
        ]  # fmt: skip
        written = network.generate(
            seen[0], do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new_tokens
        )[:, seen[0].shape[1] :]
        for prompt, into in zip(seen, (students, teachers), strict=True):
            # The state before a token predicts it.
            states = network.model(torch.cat([prompt, written], dim=1)).last_hidden_state[0]
            into.append(states[prompt.shape[1] - 1 : -1])
        targets.append(written[0])
    found = [torch.cat(parts) for parts in (students, teachers, targets)]
    if found[0].shape[0] < tokens:
        raise ValueError(f"tokens: {tokens} asked for, {found[0].shape[0]} sampled")
    chosen = torch.randperm(found[0].shape[0])[:tokens]
    student, teacher, target = (part[chosen].clone() for part in found)
    return {
        "student_hidden": student,
        "teacher_hidden": teacher,
        "weight": network.lm_head.weight.detach().clone(),
        "targets": target,
    }


def read_problem(path: Path, dtype: torch.dtype, objective: str) -> Problem:
    """What `main` has written, as `make_problem` makes one."""
    found = load_file(path)
    return Problem(
        found["student_hidden"].to(dtype).requires_grad_(),
        found["teacher_hidden"].to(dtype),
        found["weight"].to(dtype).requires_grad_(),
        found["targets"],
        objective,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.activations", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    save_file(sampled(args.model, args.tokens, args.new_tokens, args.seed), args.output)


if __name__ == "__main__":
    main()
